"""The layers of any denoiser of diffusers that read text by cross-attention, and how a row of text becomes their keys and values.

Which layers these are, and what stands between the model's input and them, is read off the model's modules. A release rests on none of it:
rows of a layer are a function of each row alone, which is tried here. That they are all layers which read text, and that keys and values
are the model's own, is proven at the first call, before its charge (`denoiser_gate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import DPXAttnError, UnsupportedModelError
from ...mechanisms.base import LayerSpec
from ..layer import home
from .architectures import rowwise_reason, unwrap
from .attention_layer import AttentionLayer, project
from .intercepted import Attention, taken

Path = Callable[[torch.Tensor], torch.Tensor]

NAMES = ("attn2", "cross_attn", "cross_attention")
# what a model does to all rows of text before its layers see them, in this order
PATHS = (
    ("condition_embedder.text_embedder",),
    ("caption_projection", "caption_norm"),
    ("encoder_hid_proj",),
    ("cross_attention_proj",),
    ("crossattn_proj",),
    ("text_proj",),
)
JOINT = "text and image rows share one joint attention"
NONE = "it has no layer that reads text by cross-attention"


class UndoError(UnsupportedModelError):
    """What stands in the way was switched on or loaded, and is refused after `protect` as well."""


def refuse(
    model: Any, reason: str, kind: type[UnsupportedModelError] = UnsupportedModelError
) -> UnsupportedModelError:
    return kind(
        f"{type(model).__name__} cannot be protected: {reason}. With mechanism='library' every pipeline with a `prompt` can. Nothing was "
        "patched."
    )


def _part(model: Any, name: str) -> Any:
    for attribute in name.split("."):
        model = getattr(model, attribute, None)
    return model


def text_path(model: Any) -> tuple[nn.Module, ...]:
    """The modules that a row of text goes through before all layers. Raises UnsupportedModelError for one that is not of rows."""
    modules = [part for names in PATHS for name in names if isinstance(part := _part(model, name), nn.Module)]
    for part in modules:
        if "IPAdapter" in type(part).__name__:
            raise refuse(model, "an IP-Adapter was loaded; unload it first", UndoError)
        if "Image" in type(part).__name__:
            raise refuse(model, "it projects an image inside the model")
        if isinstance(part, nn.ModuleList):
            raise refuse(model, "it projects the text anew for each of its layers")
    return tuple(modules)


def _is_added(module: Any) -> bool:
    return type(getattr(module, "processor", None)).__name__.startswith("AttnAddedKV")


def _reads_text(model: Any, name: str, module: Any) -> bool:
    if not all(isinstance(getattr(module, n, None), nn.Module) for n in ("to_q", "to_k", "to_v")):
        return False
    if _is_added(module):
        return module.added_kv_proj_dim is not None
    if name.rpartition(".")[2] in NAMES:
        return getattr(module, "is_cross_attention", True) is not False
    width = getattr(getattr(model, "config", None), "cross_attention_dim", None)
    inputs = [getattr(getattr(p, "base_layer", p), "in_features", None) for p in (module.to_q, module.to_k)]
    return isinstance(width, int) and inputs[1] == width != inputs[0]


def find_text_layers(model: Any, prefix: str = "") -> dict[str, TextLayer]:
    """The layers by name, in module order. prefix: of their names, where a host has several models.

    Raises:
        UnsupportedModelError: there are none, or one is of a kind whose rows are not known to stand for themselves.
    """
    model = unwrap(model)
    path = text_path(model)
    named = [(n, m) for n, m in model.named_modules() if _reads_text(model, n, m)]
    if not named:
        joint = any(getattr(m, "add_q_proj", None) is not None for m in model.modules())
        raise refuse(model, JOINT if joint or "Joint" in _block_names(model) else NONE)
    return {f"{prefix}{n}": TextLayer(f"{prefix}{n}", m, path, model, n) for n, m in named}


def _block_names(model: nn.Module) -> str:
    return " ".join({type(m).__name__ for m in model.modules()})


class TextLayer(AttentionLayer):
    """One layer. Keys and values are what its own processor hands to scaled dot-product attention.

    path: what a row of text goes through before it. added: it attends to text and to itself under one softmax, the text first.
    """

    def __init__(
        self, name: str, module: Any, path: Sequence[nn.Module], model: Any, inner_name: str
    ) -> None:
        self.name, self.module, self.path, self.softcap = name, module, tuple(path), None
        self.added = _is_added(module)
        before = getattr(
            model.get_submodule(inner_name.rpartition(".")[0]) if "." in inner_name else model,
            "norm1_context",
            None,
        )
        self._norm = before if isinstance(before, nn.Module) else None
        self._needs_mask = type(getattr(module, "processor", None)).__name__.startswith("Lumina")
        self._forward = type(module).forward
        if not self.added and getattr(module, "add_k_proj", None) is not None:
            raise refuse(model, f"{name} reads an image beside the text")
        self._check_parts(model)
        self.channels = self._width(model)
        self._try(model)

    # ---- what it is --------------------------------------------------------------------------------------------------------

    def parts(self) -> list[nn.Module]:
        if self.added:
            return [self.module.add_k_proj, self.module.add_v_proj]
        return [self.module.to_k, self.module.to_v]

    def _check_parts(self, model: Any) -> None:
        key, value = self.parts()
        reason = rowwise_reason(_Named(key, value))
        if reason is not None:
            raise refuse(model, f"{self.name}: {reason}")
        norm = getattr(self.module, "norm_cross", None)
        if norm is not None and not isinstance(norm, (bool, nn.LayerNorm)):
            raise refuse(model, f"{self.name} normalises across the rows of the text, which mixes them")

    def _width(self, model: Any) -> int:
        """Channels of a row where it enters the model."""
        first: Any = next(
            (m for part in self.path for m in part.modules() if hasattr(m, "in_features")), None
        )
        if first is None:
            if self.path and type(self.path[0]).__name__ != "RMSNorm":
                raise refuse(model, f"what {type(self.path[0]).__name__} does to the text is not known")
            first = getattr(self.parts()[0], "base_layer", self.parts()[0])
        return int(first.in_features)

    def _try(self, model: Any) -> None:
        """Its heads, dims and scale, and whether rows stand for themselves: one that is changed changes no other."""
        weight = next(self.module.parameters())
        device = home(self.module, torch.device("cpu"))
        gen = torch.Generator().manual_seed(0)
        rows = torch.randn(1, 3, self.channels, generator=gen).to(device, self._dtype(weight))
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                call = self._taken(rows)
                rows[:, 1] = torch.nan
                other = self._taken(rows)
        except DPXAttnError as error:
            kind = type(self.module.processor).__name__
            sliced = UndoError if "Sliced" in kind else UnsupportedModelError
            raise refuse(model, f"{self.name} has a processor ({kind}) of another kind", sliced) from error
        except Exception as error:
            raise refuse(
                model, f"{self.name} could not be run on rows of text alone ({type(error).__name__})"
            ) from error
        self.heads, self.key_dim, self.value_dim = (
            call.key.shape[1],
            call.key.shape[3],
            call.value.shape[3],
        )
        self.scale = call.scale
        same = [
            torch.equal(a[:, :, [0, 2]], b[:, :, [0, 2]])
            for a, b in ((call.key, other.key), (call.value, other.value))
        ]
        if call.query.shape[1] != self.heads or not all(same):
            why = "mixes the rows of the text" if not all(same) else "has fewer heads of keys than of queries"
            raise refuse(model, f"{self.name} {why}")
        rows[:, 1] = 0.5
        self._direct = self._is_direct(rows)

    def _dtype(self, weight: torch.Tensor) -> torch.dtype:
        first = next((p for part in self.path for p in part.parameters()), weight)
        return first.dtype

    # ---- keys and values ---------------------------------------------------------------------------------------------------

    def _through(self, rows: torch.Tensor) -> torch.Tensor:
        for part in self.path:
            rows = part(rows)
        return rows if self._norm is None else self._norm(rows)

    def _taken(self, rows: torch.Tensor) -> Attention:
        rows = self._through(rows)
        first: Any = getattr(self.module.to_q, "base_layer", self.module.to_q)
        hidden = rows.new_zeros(len(rows), 1, first.in_features)
        hidden = hidden.mT if self.added else hidden
        n = rows.shape[1]
        masks = {"attention_mask": rows.new_ones(len(rows), n, dtype=torch.bool)} if self._needs_mask else {}
        call = taken(lambda: self._forward(self.module, hidden, encoder_hidden_states=rows, **masks))
        return Attention(call.query, call.key[:, :, :n], call.value[:, :, :n], None, call.rest)

    def _is_direct(self, rows: torch.Tensor) -> bool:
        """Whether `attention_layer.project` gives the same, without a call of the layer."""
        if self.added or not all(hasattr(self.module, n) for n in ("heads", "norm_cross", "norm_k")):
            return False
        try:
            with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
                pairs = zip(project(self.module, self._through(rows)), self._pair(rows), strict=True)
                return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        except Exception:
            return False

    def _pair(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        call = self._taken(rows)
        return call.key, call.value

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return project(self.module, self._through(rows)) if self._direct else self._pair(rows)

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        if self._direct and not self.path and self._norm is None and self.module.norm_k is None:
            return super().spec(dtype)
        return LayerSpec(self.name, self.heads, self.key_dim, self.value_dim, self.scale)


class _Named:
    """Two projections as `rowwise_reason` reads them."""

    def __init__(self, to_k: nn.Module, to_v: nn.Module) -> None:
        self.to_k, self.to_v = to_k, to_v


def channels_of(layers: Mapping[str, TextLayer]) -> int:
    """Of a row of text. Raises UnsupportedModelError where layers take rows of several widths."""
    widths = {layer.channels for layer in layers.values()}
    if len(widths) != 1:
        name, layer = next(iter(layers.items()))
        raise refuse(layer.module, f"its layers ({name}, ...) read rows of several widths")
    return widths.pop()
