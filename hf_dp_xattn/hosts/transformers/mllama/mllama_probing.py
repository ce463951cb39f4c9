"""Which models are supported whose text reads an image by cross-attention (Mllama): found out by running the model, as for encoder-decoder
models. The text is public; the projected output of the vision model is the context.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ....errors import DPXAttnError, UnsupportedModelError
from ...private_run import evaluating
from ..encoder_decoder.cross_layers import CrossLayer
from ..encoder_decoder.cross_probing import ROWS, probe

STATES = "cross_attention_states"
# the marker's row and one of NaN: neither the projections of the first token nor the layers' cache grow with the image
PLACEHOLDER_ROWS = 2
SUPPORTED = "Supported of this kind: MllamaForConditionalGeneration (Llama 3.2 Vision)."


def refuse(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be protected: {reason}. {SUPPORTED} Nothing was patched."
    )


def is_image_text(host: Any) -> bool:
    """Whether `host` is a model of transformers that generates text and takes `cross_attention_states` of a vision model of its own."""
    return (
        isinstance(host, PreTrainedModel)
        and isinstance(host, GenerationMixin)
        and not getattr(host.config, "is_encoder_decoder", False)
        and hasattr(host.config, "vision_config")
        and STATES in inspect.signature(host.forward).parameters
    )


def vision_parts(model: Any) -> tuple[nn.Module, nn.Module]:
    """(vision model, projection of its output to the rows that the text reads).

    Raises:
        UnsupportedModelError: they are not where Mllama has them.
    """
    body: Any = model.base_model
    vision, projector = getattr(body, "vision_model", None), getattr(body, "multi_modal_projector", None)
    if not isinstance(vision, nn.Module) or not isinstance(projector, nn.Module):
        raise refuse(model, "its vision model is not where it is expected")
    return vision, projector


def context_channels(model: Any) -> int:
    """Channels of a row: of the projected vision output."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _tiles(model: Any) -> int:
    """Tiles of the probe's image: enough rows that no number of tokens equals it."""
    return -(-ROWS // int(vision_parts(model)[0].num_patches))  # type: ignore[arg-type]


def run_text(model: Any, states: torch.Tensor, ids: torch.Tensor, **kwargs: Any) -> Any:
    """All tokens see all tiles. Without that mask, sdpa takes the layers of transformers 5.23 for causal ones."""
    rows = None if kwargs.get("past_key_values") is not None else states  # later tokens read the cache
    mask = torch.ones(1, ids.shape[1], 1, _tiles(model), dtype=torch.int64, device=ids.device)
    return model(
        input_ids=ids, cross_attention_states=rows, cross_attention_mask=mask, return_dict=True, **kwargs
    )


@torch.no_grad()
def find_layers(model: Any) -> dict[str, CrossLayer]:
    """The cross-attention layers by module name, in module order. The model is left as it was.

    Raises:
        UnsupportedModelError: a layer has attention code of its own, mixes rows of the image, or something else of the text model reads
            them (it gives other logits, with or without its cache, when they are NaN).
    """
    vision_parts(model)
    if next(model.parameters()).device.type == "meta":
        raise refuse(model, "its weights are not loaded")
    try:
        with evaluating(model):
            rows = _tiles(model) * int(vision_parts(model)[0].num_patches)  # type: ignore[arg-type]
            return probe(model, context_channels(model), run_text, rows, PLACEHOLDER_ROWS)
    except DPXAttnError:
        raise
    except Exception as error:
        raise refuse(model, f"the probe of its text model failed ({type(error).__name__})") from error
