"""Which decoder-only models are supported: found out by running the model itself on public tokens, not from a table of names.

A model is supported when every layer calls the attention interface once, and when its logits stay the same (at once and token by token)
after the first tokens were taken away and are read from their keys and values alone: then nothing else carries them on. And when the same
holds of several hundred tokens, beyond every window that the configuration names, where each layer's own output must also be the softmax
over its keys and values: what a layer forgets far behind may move the logits by less than half precision does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ....errors import DPXAttnError, UnsupportedModelError
from ....mechanisms.merge import exact_partial
from ....mechanisms.rows_structure import RowsStructure
from ...placeholder import new_tag
from ...private_run import evaluating
from ...tables import LayerTable
from ..named_lengths import MOST, affordable, probed_length, rotations, unprobed_length
from ..reading import LayerState, group_queries, ungroup
from ..routing import routed
from .prefix_attention import LAYER_ATTRIBUTE, NAME, Call, Calls, Recording, Seen, recording
from .prefix_cache import PrefixCache
from .prefix_layers import PrefixLayer, device_of, make_layers, rows_of, run_recorded

PREFIX, SUFFIX = 5, 4
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 6e-2
# of one layer's output, in full and in half precision: nothing adds up over layers
LAYER_TOLERANCE = 1e-3, 2e-2
# of several hundred tokens, so many must be alike: rounding sends a few to other experts of a mixture, in half precision many
_SHARE = 0.98, 0.5
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
_OTHER_INPUTS = {
    *("pixel_values", "pixel_values_videos", "pixel_values_images", "images", "image_pixel_values"),
    *("input_features", "input_values", "input_audio_embeds", "audio_values"),
}
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


@dataclass(frozen=True)
class FixedLimits:
    """What of a model's limits is looked for once: a look at all modules would cost as much as a layer at every token.

    table: whether positions are learned. unprobed: the smallest length that its configuration names and no probe went beyond.
    """

    table: bool
    unprobed: int | None

    @classmethod
    def of(cls, model: Any) -> FixedLimits:
        config = model.config.get_text_config(decoder=True)
        return cls(has_position_table(model), unprobed_length(config, parameters_of(model)))


def parameters_of(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def position_limit(model: Any, fixed: FixedLimits | None = None) -> int | None:
    """How many positions all layers see at once: a sliding window, a chunk, a table of learned positions, or a length that the
    configuration names and that was not probed; None where there is none."""
    fixed = FixedLimits.of(model) if fixed is None else fixed
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    limits = [] if fixed.unprobed is None else [fixed.unprobed]
    window = getattr(config, "sliding_window", None)
    if window is not None:
        sliding = set(kinds) != {"full_attention"} if kinds else getattr(config, "use_sliding_window", True)
        limits += [int(window)] if sliding else []
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and (not kinds or "chunked_attention" in kinds):
        limits.append(int(chunk))
    if fixed.table:
        limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


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
    other = sorted(_OTHER_INPUTS & set(inspect.signature(model.forward).parameters))
    if other:
        raise refuse(
            model,
            f"it takes {other[0]} too, and positions of pictures or sounds cannot be counted behind a release (protect a model of text)",
        )
    if device_of(model).type == "meta":
        raise refuse(model, f"its weights are not loaded ({ON_META})")
    if rotations(model.config.get_text_config(decoder=True)) & set(_BY_LENGTH):
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
    ids = _token_ids(model, PREFIX + SUFFIX).to(device_of(model))
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
        _compare(model, _suffix(model, layers, calls, ids, [SUFFIX]), reference[:, PREFIX:])
        _compare(model, _suffix(model, layers, calls, ids, [1] * SUFFIX), reference[:, PREFIX:])
    _probe_far(model, layers)
    return layers


def _probe_far(model: Any, layers: dict[str, PrefixLayer]) -> None:
    """The same at a length of several hundred, within the limits that are known: with nearly all of it in the prefix, and nearly nothing;
    of a large model, with half of it.

    Of the last hidden states: logits of several hundred tokens are large.
    """
    config = model.config.get_text_config(decoder=True)
    length = min(probed_length(config, parameters_of(model)), position_limit(model) or MOST)
    if length <= PREFIX + SUFFIX:
        return
    ids = _token_ids(model, length, seed=0).to(device_of(model))
    state = Recording({layer.module: layer.config for layer in layers.values()}, judge=_judge(model))
    with routed(state.configs, NAME), recording(state):
        reference = model.base_model(input_ids=ids, use_cache=False)[0].float()
    small = affordable(parameters_of(model)) == MOST
    for prefix in (PREFIX, length - SUFFIX) if small else (length // 2,):
        rows = rows_of(run_recorded(model, layers, ids[:, :prefix]))
        with serving(model, layers, rows) as calls:
            parts = [length - prefix - 2, 1, 1]
            hidden = _suffix(model, layers, calls, ids, parts, prefix, head=False)
        _compare(
            model,
            hidden,
            reference[:, prefix:],
            _CHANGES.format(length=length),
            _SHARE[model.dtype not in TOLERANCE],
        )


def _judge(model: Any) -> Callable[[nn.Module, Seen, torch.Tensor], None]:
    """Compares a layer's output [B, m, Hq, dv] with causal softmax attention over the keys and values that it was given."""
    limit = LAYER_TOLERANCE[model.dtype not in TOLERANCE]

    def judge(module: nn.Module, seen: Seen, out: torch.Tensor) -> None:
        m, heads, query_heads = seen.key.shape[2], seen.key.shape[1], seen.query.shape[1]
        hidden = torch.ones(m, m, dtype=torch.bool, device=out.device).triu(1)
        bias = torch.zeros(m, m, device=out.device).masked_fill(hidden, -torch.inf)
        grouped = group_queries(seen.query, heads)
        bias = bias.repeat(query_heads // heads, 1)
        exact, _ = exact_partial(grouped, seen.key, seen.value, seen.scale, bias, seen.softcap)
        want = ungroup(exact, query_heads, m).transpose(1, 2)
        error = (out.reshape(want.shape).float() - want).norm(dim=-1).amax()
        if not float(error) <= limit * float(want.norm(dim=-1).amax().clamp_min(1e-6)):
            raise refuse(model, _CHANGES.format(length=m))

    return judge


def _token_ids(model: Any, count: int, seed: int | None = None) -> torch.Tensor:
    """[1, count] public tokens, none of which is special; in turn, or at random."""
    config = model.config.get_text_config(decoder=True)
    special = {getattr(config, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    plain = [i for i in range(min(int(config.vocab_size), 32)) if i not in special]
    if seed is None:
        return torch.tensor([(plain * count)[-count:]])
    chosen = torch.randint(len(plain), (1, count), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(plain)[chosen]


def tables_of(
    layers: dict[str, PrefixLayer], rows: torch.Tensor, bias: torch.Tensor | None = None
) -> dict[str, LayerTable]:
    """What layers read of public rows [B, P, C], with log weights [B, P] or exactly. Gradients flow to both."""
    bias = rows.new_zeros(rows.shape[:2]) if bias is None else bias
    tags = torch.zeros(len(rows), 1)
    tables = {}
    for name, layer in layers.items():
        key, value = layer.project(rows)
        tables[name] = LayerTable(tags, RowsStructure(key, value, bias[:, None, None], layer.scale))
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
    model: Any,
    layers: dict[str, PrefixLayer],
    calls: Calls,
    ids: torch.Tensor,
    parts: Sequence[int],
    prefix: int = PREFIX,
    *,
    head: bool = True,
) -> torch.Tensor:
    """The logits (or, without the head, the last hidden states) of the tokens after the prefix, so many tokens at a time."""
    assert calls.current is not None
    cache = PrefixCache([new_tag()], prefix, len(layers), trial=True)
    run = model if head else model.base_model
    outputs, first = [], calls.current
    for part in ids[:, prefix:].split(list(parts), dim=1):
        calls.current = Call(first.tables, first.index, first.offset, cache.suffix + part.shape[1])
        outputs.append(
            run(input_ids=part, past_key_values=cache, use_cache=True)[0 if not head else "logits"]
        )
    return torch.cat(outputs, dim=1)


_CARRIES = (
    "its logits change when its first tokens are read from their keys and values alone (something else carries them on, or its attention "
    "is not a softmax over keys and values)"
)
_CHANGES = (
    "of {length} tokens its attention is not the softmax over all keys and values that it is of a few (a window, a block or a number of "
    "kept tokens, which a release cannot follow)"
)


def _compare(
    model: Any, hidden: torch.Tensor, reference: torch.Tensor, reason: str = _CARRIES, share: float = 1.0
) -> None:
    """share: of the tokens, how many must be alike."""
    limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE) * float(reference.abs().max().clamp_min(1e-3))
    errors = (hidden.float() - reference).abs().amax(dim=-1).flatten()
    if not float(errors.quantile(share)) <= limit:
        raise refuse(model, reason)
