"""What each causal and encoder-decoder class of transformers does under each mechanism, found on a tiny model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto

import hf_dp_xattn as dpx

from ..hosts.text.libraries import answer_with, config, library
from ..hosts.text.words import tokenizer
from .findings import MECHANISMS, WORKS, Finding, NotBuilt, accepted, codes, reason

VOCABULARY = 64
LARGEST = 30_000_000  # parameters
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    "query_pre_attn_scalar": 8,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 32,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "sliding_window": 256,
    "state_size": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
}
VARIANTS: tuple[dict[str, Any], ...] = (  # where a class refuses these sizes
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 8, "num_layers": 8, "n_layers": 8},
    {"num_hidden_layers": 8, "num_key_value_heads": 4},
)
SECRETS = "never say the secret code", "speak like a pirate in french please"

PUBLIC = (
    "please be polite",
    "close at five",
    "answer in french",
    "open on monday",
    "the code is red",
    "be blue",
)


def classes(kind: str) -> dict[str, type[Any]]:
    """Configuration class of each model class. kind: "causal" or "seq2seq"."""
    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }[kind]
    found: dict[str, type[Any]] = {}
    for model_type, name in names.items():
        cls = getattr(tf, name if isinstance(name, str) else name[0], None)
        known = tf.models.auto.configuration_auto.CONFIG_MAPPING_NAMES.get(model_type)
        if cls is not None and known is not None:
            found.setdefault(cls.__name__, getattr(tf, known))
    return found


def small(cls: type[Any], changes: dict[str, Any]) -> Any:
    """A configuration of a class with few and narrow layers, its parts too. changes: of `SMALL`."""
    default = cls()
    known = {**default.to_dict(), **dict.fromkeys(getattr(cls, "attribute_map", {}))}
    given = {n: v for n, v in {**SMALL, **changes}.items() if n in known}
    given |= {
        n: small(type(getattr(default, n)), changes)
        for n in getattr(cls, "sub_configs", {})
        if getattr(default, n, None)
    }
    return cls(**given)


def build(name: str, config_class: type[Any]) -> Any:
    """Raises NotBuilt where such a model is large, or does not generate unprotected."""
    first: Exception | None = None
    for changes in VARIANTS:
        try:
            return _built(name, small(config_class, changes))
        except NotBuilt:
            raise
        except Exception as error:
            first = first or error
    raise NotBuilt(f"{type(first).__name__}: {str(first)[:160]}") from first


def _built(name: str, made: Any) -> Any:
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(tf, name)(made).parameters())
    if count > LARGEST:
        raise NotBuilt(f"{count:,} parameters")
    torch.manual_seed(3)
    model = getattr(tf, name)(made).eval()
    model.generation_config.pad_token_id = 0
    if model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # so that what is private has a visible effect
    answer(model, {"input_ids": ids(5)})
    return model


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 40, (1, count), generator=torch.Generator().manual_seed(seed))


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The scores of two greedy tokens [2, B, V]."""
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    return torch.nan_to_num(torch.stack(tuple(out["scores"])), neginf=0.0)


def probe(name: str, config_class: type[Any], kind: str) -> Finding:
    """Raises NotBuilt."""
    model = build(name, config_class)
    how: dict[str, str] = {}
    for mechanism in reversed(MECHANISMS):
        if mechanism not in ("none", "library") and how["none"] != WORKS:
            how[mechanism] = how["none"]
            continue
        how[mechanism] = _how(mechanism, model, kind)
    return Finding(("text",), how)


def _how(mechanism: str, model: Any, kind: str) -> str:
    try:
        if mechanism == "library":
            return _library(model, kind)
        return _exact(model, kind) if mechanism == "none" else accepted(mechanism, model)
    except dpx.UnsupportedModelError as error:
        return f"refused: {reason(str(error))}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error)[:200]}"
    finally:
        dpx.unprotect(model)


def _exact(model: Any, kind: str) -> str:
    """Exact attention by the protected path gives the tokens of the unprotected model."""
    private, own = ids(9, 1), ids(4, 2)
    inputs = {"input_ids": private if kind == "seq2seq" else torch.cat([private, own], 1)}
    want = answer(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
    handle = dpx.protect(model, dpx.DPXAttnConfig(unit="row", mechanism="none"), ledger=dpx.Ledger())
    if kind == "seq2seq":
        got = answer(model, handle.release(private).inputs())
    else:
        release = handle.release(private[0], prefix_bucket=private.shape[1])
        got = answer(model, release.inputs(input_ids=own))
    apart = float((got - want).abs().max() / want.abs().max().clamp_min(1.0))
    return WORKS if apart <= 1e-4 else f"fails: {apart:.1e} from the unprotected model"


def _library(model: Any, kind: str) -> str:
    """Two private texts with one release: equal scores, and one charge each."""
    made = library(model, PUBLIC, tokenizer=tokenizer(), encoder=codes)
    found = []
    for secret in SECRETS:
        given: dict[str, Any] = {"calibration": made, "encoder": codes, "ledger": dpx.Ledger()}
        handle = dpx.protect(model, config(), tokenizer=tokenizer(), **given)
        answer_with(handle, PUBLIC[0])
        release = handle.release(secret)
        own = {} if kind == "seq2seq" else {"input_ids": ids(4, 2)}
        found.append(answer(model, release.inputs(**own)))
        if len(handle.report().releases) != 1:
            return "fails: nothing was charged"
        dpx.unprotect(model)
    return WORKS if torch.equal(*found) else "LEAKS: scores differ"


def every() -> Iterator[tuple[str, str, type[Any]]]:
    """(kind, name of the model class, configuration class) of each."""
    for kind in ("causal", "seq2seq"):
        for name, config_class in classes(kind).items():
            yield kind, name, config_class
