"""Which decoder-only models are supported: found out by running the model itself on public tokens, not from a table of names.

A model is supported when every layer calls the attention interface once, and when its logits stay the same (at once and token by token)
after the first tokens were taken away and are read from their keys and values alone: then nothing else carries them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ...errors import DPXAttnError, UnsupportedModelError
from ...mechanisms.rows_structure import RowsStructure
from ..placeholder import new_tag
from ..processor import LayerTable
from ..routing import evaluating, routed
from .attention import LAYER_ATTRIBUTE, NAME, Call, Calls, LayerState, Recording, recording
from .cache import PrefixCache
from .layers import PrefixLayer, device_of, make_layers, rows_of, run_recorded

PREFIX, SUFFIX = 5, 4
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 6e-2
SUPPORTED = (
    "Supported: decoder-only language models of transformers (Llama, Qwen, Mistral, Gemma, GPT-2, Phi, OLMo, ... see docs/hosts.md) whose "
    "layers all call the attention interface."
)
_HARD_CODED = "its attention is computed in its own code, not through the attention interface of transformers"
ON_META = "they are on the meta device, and no hook of accelerate with an execution device brings them from elsewhere"
_TABLES = (
    "wpe",
    "embed_positions",
    "position_embeddings",
    "position_embedding",
)


_BY_LENGTH = ("dynamic", "longrope")


def refuse(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be protected: {reason}. {SUPPORTED} Nothing was patched."
    )


def is_decoder_only(host: Any) -> bool:
    """Whether `host` is a model of transformers that generates and is no encoder-decoder (supported or not)."""
    return (
        isinstance(host, PreTrainedModel)
        and isinstance(host, GenerationMixin)
        and not getattr(host.config, "is_encoder_decoder", False)
    )


def has_position_table(model: Any) -> bool:
    """Whether positions are learned, so that there are only so many."""
    named = model.named_modules()
    return any(n.rpartition(".")[2] in _TABLES and isinstance(m, nn.Embedding) for n, m in named)


def position_limit(model: Any, table: bool | None = None) -> int | None:
    """How many positions all layers see at once: a sliding window, a chunk, or a table of learned positions; None where there is none.

    table: `has_position_table`, where it is known: a look at all modules would cost as much as a layer at every token.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    limits = []
    window = getattr(config, "sliding_window", None)
    if window is not None:
        sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
        limits += [int(window)] if sliding else []
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and (not kinds or "chunked_attention" in kinds):
        limits.append(int(chunk))
    if has_position_table(model) if table is None else table:
        limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def _rotations(config: Any) -> set[str]:
    """The kinds of rotary embedding that a config names, for all layers or for each type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [given, *(v for v in given.values() if isinstance(v, dict))]
    return {str(p.get("rope_type", p.get("type"))) for p in parts}


@torch.no_grad()
def find_layers(model: Any) -> dict[str, PrefixLayer]:
    """The attention layers by module name, in the order in which they run. The model is left as it was.

    Raises:
        UnsupportedModelError: see the module's docstring.
    """
    if not is_decoder_only(model):
        raise refuse(model, "it is not a decoder-only model that generates")
    if model.main_input_name != "input_ids":
        raise refuse(model, f"it generates from {model.main_input_name}, not from token ids")
    if device_of(model).type == "meta":
        raise refuse(model, f"its weights are not loaded ({ON_META})")
    if _rotations(model.config.get_text_config(decoder=True)) & set(_BY_LENGTH):
        raise refuse(
            model,
            "its rotary embedding changes with the length of a sequence, so keys of a prefix would not keep",
        )
    try:
        with evaluating(model):
            return _probe(model)
    except DPXAttnError:
        raise
    except Exception as error:
        raise refuse(model, f"the probe of its layers failed ({type(error).__name__})") from error


def _candidates(model: Any) -> dict[str, nn.Module]:
    """Modules with a config of their own: one of them asks it for its attention."""
    return {
        name: module
        for name, module in model.base_model.named_modules(prefix=_prefix(model))
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
        and not isinstance(module, PreTrainedModel)
    }


def _prefix(model: Any) -> str:
    return "" if model.base_model is model else str(model.base_model_prefix)


def _probe(model: Any) -> dict[str, PrefixLayer]:
    if model.base_model is model:
        raise refuse(model, "it has no body apart from its head")
    ids = _token_ids(model).to(device_of(model))
    reference = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(reference.isfinite().all()):
        raise refuse(model, "the probe gave NaN or Inf")
    candidates: dict[str, Any] = _candidates(model)
    state = Recording({module: module.config for module in candidates.values()})
    with routed(candidates.values(), NAME), recording(state):
        _compare(model, model(input_ids=ids, use_cache=False).logits, reference)
    names = {module: name for name, module in candidates.items()}
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(state.seen) != expected:
        raise refuse(model, _HARD_CODED if not state.seen else "some of its layers are no attention layers")
    if any(s.calls != 1 or s.key.shape[2] != ids.shape[1] for s in state.seen.values()):
        raise refuse(model, "a layer calls the attention interface in a way that is not understood")
    layers = make_layers([(names[m], m, state.configs[m], s) for m, s in state.seen.items()])
    for layer in layers.values():
        if layer.query_heads % layer.heads:
            raise refuse(model, f"{layer.name} has odd numbers of heads")
    rows = rows_of(run_recorded(model, layers, ids[:, :PREFIX]))
    with serving(model, layers, rows) as calls:
        _compare(model, _suffix(model, layers, calls, ids, SUFFIX), reference[:, PREFIX:])
        _compare(model, _suffix(model, layers, calls, ids, 1), reference[:, PREFIX:])
    return layers


def _token_ids(model: Any) -> torch.Tensor:
    """[1, PREFIX + SUFFIX] public tokens, none of which is special."""
    config = model.config.get_text_config(decoder=True)
    special = {getattr(config, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    found = [i for i in range(min(int(config.vocab_size), 32)) if i not in special]
    count = PREFIX + SUFFIX
    return torch.tensor([(found * count)[-count:]])


def tables_of(
    layers: dict[str, PrefixLayer], rows: torch.Tensor, bias: torch.Tensor | None = None
) -> dict[str, LayerTable]:
    """What layers read of public rows [B, P, C], with log weights [B, P] or exactly. Gradients flow to both."""
    bias = rows.new_zeros(rows.shape[:2]) if bias is None else bias
    tags, allow = torch.zeros(len(rows), 1), torch.tensor(False)
    tables = {}
    for name, layer in layers.items():
        key, value = layer.project(rows)
        tables[name] = LayerTable(allow, tags, RowsStructure(key, value, bias[:, None, None], layer.scale))
    return tables


@contextmanager
def serving(model: Any, layers: dict[str, PrefixLayer], rows: torch.Tensor | None = None) -> Iterator[Calls]:
    """While it lasts, the model reads exact rows [1, P, C] as its prefix; without any, what the caller sets as the current call."""
    calls = Calls()
    if rows is not None:
        index = torch.zeros(1, dtype=torch.int64)
        calls.current = Call(tables_of(layers, rows), index, offset=rows.shape[1])
    with ExitStack() as stack:
        stack.enter_context(routed((layer.module for layer in layers.values()), NAME))
        for name, layer in layers.items():
            layer.module.__dict__[LAYER_ATTRIBUTE] = LayerState(name, calls, layer.config)
            stack.callback(layer.module.__dict__.pop, LAYER_ATTRIBUTE, None)
        yield calls


def _suffix(
    model: Any, layers: dict[str, PrefixLayer], calls: Calls, ids: torch.Tensor, step: int
) -> torch.Tensor:
    """The logits of the tokens after the prefix, `step` tokens at a time."""
    assert calls.current is not None
    cache = PrefixCache([new_tag()], PREFIX, len(layers))
    found, first = [], calls.current
    for part in ids[:, PREFIX:].split(step, dim=1):
        calls.current = Call(first.tables, first.index, first.offset, cache.own + part.shape[1])
        found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def _compare(model: Any, logits: torch.Tensor, reference: torch.Tensor) -> None:
    limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE) * float(reference.abs().max().clamp_min(1e-3))
    if not float((logits.float() - reference).abs().max()) <= limit:
        raise refuse(
            model,
            "its logits change when its first tokens are read from their keys and values alone (something else carries them on, or its "
            "attention is not a softmax over keys and values)",
        )
