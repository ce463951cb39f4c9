"""Which hosts are supported, and where their text cross-attention is. Explicit tables: what is not listed is refused.

A UNet is supported when its text reaches the picture through `attn2` of `BasicTransformerBlock`s and by no other way: no pooled
text embedding, no projection of the text inside the model, no image prompt, no added keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ..placeholder import CODE_CHANNELS
from .attention_layer import AttentionLayer

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
SUPPORTED = "Supported: " + ", ".join(PIPELINES) + " and their UNet2DConditionModel."

LANGUAGE_MODELS = (
    "Supported are models with a language head (...ForConditionalGeneration, ...ForCausalLM, EncoderDecoderModel, ...) of the "
    "architectures in docs/hosts.md; a bare encoder, or a model without its head (LlamaModel, BertModel), is not."
)

# Methods through which a supported pipeline's prompt flows; a subclass that overrides one may send it elsewhere.
PROMPT_METHODS = ("__call__", "encode_prompt", "_encode_prompt", "check_inputs")

BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
}
# Processors that compute plain softmax attention, which ours replaces; anything else does something of its own.
PLAIN_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}

REASONS = {
    "StableDiffusionXL": "its pooled text embedding reaches the time embedding past cross-attention",
    "ControlNet": "the ControlNet reads the prompt with layers of its own, and its residuals carry it into the UNet",
    "PixArt": "its caption projection and the token count of the prompt reach the picture",
    "StableDiffusion3": "text and image rows share one joint attention",
    "Flux": "text and image rows share one joint attention, beside a pooled text embedding",
    "Depth2Img": "it has an encode_prompt of its own that is not in the table yet",
    "GLIGEN": "grounding phrases reach the picture through layers of their own",
    "LEdits": "it replaces the attention processors and reads the attention maps",
    "PAG": "it replaces the attention processors",
    "Pix2Pix": "it orders its three guidance passes in a way of its own and has its own prompt encoder",
    "Kandinsky": "image embeddings made from the prompt reach the picture past cross-attention",
}


def unwrap(model: Any) -> Any:
    """The module behind `torch.compile(model)`."""
    return getattr(model, "_orig_mod", model)


def refuse_host(host: Any) -> UnsupportedModelError:
    """What to say of a host that is not in the tables, and which kinds are."""
    host = unwrap(host)
    name = type(host).__name__
    if type(host).__module__.split(".")[0] == "peft":
        return UnsupportedModelError(
            f"{name} is a wrapper around a model: protect the model inside it, dpx.protect(model.get_base_model(), ...), which keeps its "
            "adapters. Nothing was patched."
        )
    if name in PIPELINES:
        unet = getattr(host, "unet", None)
        has = (
            "has no UNet (unet=None)" if unet is None else f"has a {type(unwrap(unet)).__name__} for its UNet"
        )
        return UnsupportedModelError(
            f"This {name} {has}, so there is nothing to protect: load it with its UNet2DConditionModel, or protect the pipeline that draws "
            "the pictures. Nothing was patched."
        )
    if isinstance(host, dict):
        return UnsupportedModelError(
            f"These are components, not a host: pass the pipeline itself, or its UNet. {SUPPORTED} Nothing was patched."
        )
    if isinstance(host, PreTrainedModel):
        return UnsupportedModelError(
            f"{name} cannot be protected: it is not in the table of hosts. {LANGUAGE_MODELS} Nothing was patched."
        )
    reason = next(
        (text for key, text in REASONS.items() if key.lower() in name.lower()),
        "it is not in the table of hosts",
    )
    return UnsupportedModelError(f"{name} cannot be protected: {reason}. {SUPPORTED} Nothing was patched.")


def check_pipeline_class(pipe: Any) -> None:
    """Raises UnsupportedModelError unless `pipe` is in the table and its prompt flows through the methods that we know."""
    import diffusers

    for name in PIPELINES:
        known = getattr(diffusers, name)
        if not isinstance(pipe, known):
            continue
        changed = [m for m in PROMPT_METHODS if getattr(type(pipe), m, None) is not getattr(known, m, None)]
        changed += [m for m in PROMPT_METHODS if m in vars(pipe)]
        if changed:
            raise UnsupportedModelError(
                f"{type(pipe).__name__} replaces {', '.join(changed)} of {name}, so the prompt may go elsewhere. Protect a plain "
                f"{name} with the same components, or encode the prompt yourself and protect the UNet. Nothing was patched."
            )
        return
    raise refuse_host(pipe)


def check_text_encoders(host: Any) -> None:
    """Raises UnsupportedModelError where a text encoder of a diffusers pipeline is no torch.nn.Module: nothing could gate it."""
    from diffusers import DiffusionPipeline

    pipe: Any = host if isinstance(host, DiffusionPipeline) else None
    for name, part in () if pipe is None else pipe.components.items():
        if "text_encoder" in name and part is not None and not isinstance(part, nn.Module):
            raise UnsupportedModelError(
                f"{type(host).__name__} cannot be protected: its {name} is a {type(part).__name__}, no torch.nn.Module (it may be of ONNX "
                "or OpenVINO), so nothing could keep it from reading a text that was not released. Load it with torch. Nothing was patched."
            )


def _refuse_unet(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"This UNet2DConditionModel cannot be protected: {reason}. Nothing was patched."
    )


def find_layers(unet: Any) -> dict[str, AttentionLayer]:
    """The text cross-attention layers by module name, in module order.

    Every attention layer of the model must be `attn1` or `attn2` of a plain `BasicTransformerBlock`, so each layer that
    sees the text is found, and no other.

    Raises:
        UnsupportedModelError: the text has another way to the picture, or a layer is of a kind that we do not know.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention

    reason = side_channel_reason(unet)
    if reason is not None:
        raise _refuse_unet(reason)
    blocks = [*unet.down_blocks, *unet.up_blocks] + ([] if unet.mid_block is None else [unet.mid_block])
    unknown = sorted({type(b).__name__ for b in blocks} - BLOCKS)
    if unknown:
        raise _refuse_unet(f"its blocks {', '.join(unknown)} are not in the table")
    transformers = {n: m for n, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    layers: dict[str, AttentionLayer] = {}
    known = set()
    for name, block in transformers.items():
        if block.only_cross_attention or block.attn2 is None or not block.attn2.is_cross_attention:
            raise _refuse_unet(f"{name} is not a block with self-attention followed by cross-attention")
        if block.attn1.is_cross_attention:
            raise _refuse_unet(f"{name}.attn1 attends to the text as well")
        layers[f"{name}.attn2"] = AttentionLayer(f"{name}.attn2", block.attn2)
        known |= {f"{name}.attn1", f"{name}.attn2"}
    attentions = {n for n, m in unet.named_modules() if isinstance(m, Attention)}
    if attentions != known or set(unet.attn_processors) != {f"{n}.processor" for n in known}:
        extra = sorted(attentions.symmetric_difference(known)) or ["a module with a processor"]
        raise _refuse_unet(f"it has attention layers outside its transformer blocks ({extra[0]}, ...)")
    if not layers:
        raise _refuse_unet("it has no cross-attention layers")
    for name, layer in layers.items():
        _check_layer(name, layer.module, unet.config.cross_attention_dim)
    return layers


def changed_reason(unet: Any, layers: dict[str, AttentionLayer]) -> str | None:
    """Why a UNet is no longer what `find_layers` found, or None."""
    names = {n for n, m in unet.named_modules() if hasattr(m, "get_processor") and n.endswith(".attn2")}
    reasons = [*(rowwise_reason(layer.module) for layer in layers.values()), side_channel_reason(unet)]
    if names != set(layers):
        reasons.append("it has gained or lost attention layers")
    return next((reason for reason in reasons if reason is not None), None)


def side_channel_reason(unet: Any) -> str | None:
    """The way around `attn2` that text or an image prompt has in this UNet, or None."""
    config = unet.config
    if config.addition_embed_type is not None:
        return f"addition_embed_type={config.addition_embed_type!r} sends the text past cross-attention"
    if unet.encoder_hid_proj is not None or config.encoder_hid_dim_type is not None:
        return "it projects the text, or an IP-Adapter image, inside the model (encoder_hid_proj); unload it first"
    if unet.class_embedding is not None:
        return "it has a class embedding"
    if getattr(unet, "position_net", None) is not None or config.attention_type != "default":
        return "it has GLIGEN layers"
    if config.dual_cross_attention:
        return "it attends to two contexts at once (dual_cross_attention)"
    if not isinstance(config.cross_attention_dim, int) or config.cross_attention_dim < CODE_CHANNELS:
        return f"cross_attention_dim must be one number, at least {CODE_CHANNELS}"
    return None


def _check_layer(name: str, attn: Any, channels: int) -> None:
    processor = type(attn.processor).__name__
    if processor not in PLAIN_PROCESSORS:
        raise _refuse_unet(f"{name} has the processor {processor}; restore the default one first")
    if (
        attn.added_kv_proj_dim is not None
        or attn.cross_attention_dim != channels
        or attn.only_cross_attention
    ):
        raise _refuse_unet(f"{name} has added keys and values, or another context")
    if attn.norm_cross is not None and not isinstance(attn.norm_cross, nn.LayerNorm):
        raise _refuse_unet(f"{name} normalises across the rows of the text, which mixes them")
    head_dim = attn.inner_dim // attn.heads
    if attn.inner_kv_dim != attn.inner_dim or not math.isclose(attn.scale, head_dim**-0.5, rel_tol=1e-6):
        raise _refuse_unet(f"{name} has another logit scale or other key heads than usual")
    reason = rowwise_reason(attn)
    if reason is not None:
        raise _refuse_unet(f"{name}: {reason}")


def rowwise_reason(attn: Any) -> str | None:
    """Why a row's key and value may depend on other rows (then the sensitivity of one row is not bounded), or None.

    Plain linear layers and PEFT's LoRA on them act on each row alone; quantised ones may scale by the whole tensor's maximum.
    """
    for module in (attn.to_k, attn.to_v):
        base = getattr(module, "base_layer", module)
        if base is not module and type(module).__module__ != "peft.tuners.lora.layer":
            return f"{type(module).__name__} is an adapter that is not in the table (PEFT's LoRA is)"
        if type(base) is not nn.Linear:
            return f"its projections are {type(base).__name__}, not torch.nn.Linear (quantised ones may mix rows)"
        if type(base.weight) not in (nn.Parameter, torch.Tensor):
            return f"its weights are {type(base.weight).__name__}, which may mix rows"
    return None
