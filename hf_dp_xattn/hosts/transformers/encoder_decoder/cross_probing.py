"""Which encoder-decoder models are supported: found out by running the model itself on public random numbers, not from a table of names.

A model is supported when its decoder's cross-attention calls the attention interface, and when it gives the same logits (with and without
its cache) after the encoder's output was replaced by a placeholder that is NaN: then nothing else of the model reads that output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ....errors import DPXAttnError, UnsupportedModelError
from ...placeholder import CODE_CHANNELS, make_placeholder, new_tag
from ...private_run import evaluating
from ..named_lengths import longest, probed_length, rotations
from ..routing import routed
from .cross_attention import NAME, Serving, serving
from .cross_layers import CrossLayer, Invocation, rowwise_reason
from .document_contexts import MAIN_INPUTS
from .encoder_outputs import PlaceholderOutputs

ROWS = 7  # of the probe's encoder states: no other length in the probe equals it
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 6e-2
_HARD_CODED = (
    "its cross-attention is computed in its own code, not through the attention interface of transformers"
)
_CHANGED = "its encoder is changed by the texts that it reads, so that they would not be encoded apart"
REASONS = {
    "LED": _HARD_CODED,
    "Mvp": _HARD_CODED,
    "ProphetNet": _HARD_CODED,
    "FSMT": _HARD_CODED,
    "SpeechT5": _HARD_CODED,
}
SUPPORTED = (
    "Supported: encoder-decoder models of transformers (BART, T5, Marian, Whisper, ... see docs/hosts.md) whose cross-attention calls the "
    "attention interface."
)


def refuse(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be protected: {reason}. {SUPPORTED} Nothing was patched."
    )


def is_seq2seq(host: Any) -> bool:
    """Whether `host` is an encoder-decoder model of transformers (supported or not)."""
    return isinstance(host, PreTrainedModel) and bool(getattr(host.config, "is_encoder_decoder", False))


def context_channels(model: Any) -> int:
    """Channels of the encoder's output."""
    config = model.get_encoder().config
    size = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if not isinstance(size, int):
        raise refuse(model, "the width of its encoder's output is not in its config")
    return size


@torch.no_grad()
def find_layers(model: Any) -> dict[str, CrossLayer]:
    """The cross-attention layers by module name, in module order. The model is left as it was.

    Raises:
        UnsupportedModelError: see the module's docstring; or rows of the encoder's output are mixed before they become keys and values.
    """
    name = type(model).__name__
    known = next((reason for key, reason in REASONS.items() if name.startswith(key)), None)
    if not is_seq2seq(model) or not model.can_generate() or model.get_encoder() is model:
        raise refuse(model, known or "it is not an encoder-decoder model that generates")
    if next(model.parameters()).device.type == "meta":
        raise refuse(model, "its weights are not loaded")
    try:
        with evaluating(model):
            layers = probe(model, context_channels(model), run_decoder)
            _check_encoder(model)
            _probe_far(model, layers)
            return layers
    except DPXAttnError as error:
        raise error if known is None else refuse(model, known) from None
    except Exception as error:
        raise refuse(model, known or f"the probe of its decoder failed ({type(error).__name__})") from error


def _check_encoder(model: Any) -> None:
    """A release must be possible: of text, of token ids alone; of anything else, of what it mainly reads."""
    encoder, main = model.get_encoder(), model.main_input_name
    parameters = inspect.signature(encoder.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [name for name in required if name not in MAIN_INPUTS]
    if more:
        raise refuse(
            model, f"its encoder needs {', '.join(more)} beside {main}, which a release does not take"
        )
    if "dynamic" in rotations(encoder.config):
        raise refuse(model, f"{_CHANGED} (its rotation is that of the longest one so far)")
    if main != "input_ids":
        return
    try:
        with _unchanging(model, encoder):
            random = torch.get_rng_state()
            states = [encoder(input_ids=ids, return_dict=True)[0] for ids in _texts(model)]
            drawn = not torch.equal(random, torch.get_rng_state())
    except DPXAttnError:
        raise
    except Exception as error:
        raise refuse(
            model,
            f"its encoder does not run on token ids alone ({type(error).__name__}: a model of layouts?)",
        ) from error
    if drawn:
        raise refuse(model, "its encoder draws random numbers, as many as a text is long")
    for before, after in zip(states, reversed(states), strict=True):
        rounding = 8 * torch.finfo(before.dtype).eps * float(before.abs().max())
        if not float((before - after).abs().max()) <= rounding:
            raise refuse(model, _CHANGED)
    if states[0].shape[:2] != (1, 3):
        raise refuse(model, "its encoder gives another number of rows than it is given tokens")


def _texts(model: Any) -> list[torch.Tensor]:
    """Public token ids [1, n]: a short text, a longer one, one beyond every length that is named, and the first two again."""
    encoder, short = model.get_encoder(), _token_ids(model).to(model.device)
    rows = probed_length(encoder.config, sum(p.numel() for p in encoder.parameters()))
    long = short.repeat(1, -(-rows // 3))[:, : longest(encoder)]
    middle = long[:, : -(-long.shape[1] // 2)]
    return [short, middle, long, middle, short]


@contextmanager
def _unchanging(model: Any, encoder: nn.Module) -> Iterator[None]:
    """Refuses an encoder that a text changes for those after it (BigBird, by a short one): a document's rows would depend on others. It is
    put back."""

    def state() -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
        modes = (str, bool)  # numbers are what a mixture of experts counts anew for each text
        return [
            (m, {k: v for k, v in vars(m).items() if isinstance(v, modes)}, dict(m._modules))
            for m in encoder.modules()
        ]

    before = state()
    try:
        yield
    finally:
        changed = before != state()
        for module, attributes, parts in before:
            vars(module).update(attributes)
            module._modules.update(parts)
    if changed:
        raise refuse(model, _CHANGED)


def _probe_far(model: Any, layers: dict[str, CrossLayer]) -> None:
    """The same logits from several hundred rows, beyond every length that the configuration names and a probe can afford."""
    config = model.config.get_text_config(decoder=True)
    rows = probed_length(config, sum(p.numel() for p in model.parameters()))
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, rows, context_channels(model), generator=generator).to(model.device, model.dtype)
    ids = _token_ids(model).to(model.device)
    reference = _logits(run_decoder, model, states, ids)
    with routed((layer.module for layer in layers.values()), NAME), serving(Serving()):
        _compare(model, _logits(run_decoder, model, states, ids), reference)


Forward = Callable[..., Any]
"""Runs a model on states [1, n, C] of its context and token ids: (model, states, ids, **forward's keywords) -> its outputs."""


def probe(
    model: Any, channels: int, forward: Forward, rows: int = ROWS, stand_in: int = ROWS
) -> dict[str, CrossLayer]:
    """The layers of a model that is in evaluation mode; `find_layers` says what is proven.

    channels: of a row of the context. rows: how many, no length that tokens have. stand_in: rows of the placeholder.
    """
    if channels <= CODE_CHANNELS:
        raise refuse(model, f"its encoder's output needs more than {CODE_CHANNELS} channels")
    device, dtype = model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, rows, channels, generator=generator).to(device, dtype)
    ids = _token_ids(model).to(device)
    with _watching(model, rows) as calls:
        reference = _logits(forward, model, states, ids)
    bridge = getattr(model, "enc_to_dec_proj", None)
    layers = {}
    for name, (module, args, kwargs) in _deepest(calls).items():
        layers[name] = _layer(model, name, module, args, kwargs, states, bridge)
    if not layers:
        raise refuse(model, _HARD_CODED)
    with routed((layer.module for layer in layers.values()), NAME):
        with serving(Serving()) as exact:
            _compare(model, _logits(forward, model, states, ids), reference)
        _check_reached(model, layers, exact)
        placeholder = make_placeholder([new_tag()], stand_in, channels, dtype, device)
        with serving(Serving(exact.recorded, replay=True)):
            _compare(model, _logits(forward, model, placeholder, ids), reference)
            _compare(model, _stepwise(forward, model, placeholder, ids), reference[:, -1:])
    for layer in layers.values():
        _check_rows(model, layer, states)
    return layers


def _token_ids(model: Any) -> torch.Tensor:
    """[1, 3] public decoder tokens, none of which is padding."""
    config = model.config.get_text_config(decoder=True)
    pads = {model.config.get_text_config().pad_token_id, getattr(config, "pad_token_id", None)}
    plain = [i for i in range(min(int(config.vocab_size), 16)) if i not in pads]
    return torch.tensor([plain[-3:]])


def run_decoder(model: Any, states: torch.Tensor, ids: torch.Tensor, **kwargs: Any) -> Any:
    outputs = PlaceholderOutputs(last_hidden_state=states)
    return model(encoder_outputs=outputs, decoder_input_ids=ids, return_dict=True, **kwargs)


def _logits(forward: Forward, model: Any, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return forward(model, states, ids, use_cache=False).logits.float()


def _stepwise(forward: Forward, model: Any, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The last token's logits, by way of the cache."""
    first = forward(model, states, ids[:, :-1], use_cache=True)
    cache = first.past_key_values
    return forward(model, states, ids[:, -1:], use_cache=True, past_key_values=cache).logits.float()


def _compare(model: Any, logits: torch.Tensor, reference: torch.Tensor) -> None:
    if not bool(reference.isfinite().all()):
        raise refuse(model, "the probe of its decoder gave NaN or Inf")
    if not bool(logits.isfinite().all()):
        raise refuse(model, "its decoder reads the encoder's output past the attention interface")
    limit = TOLERANCE.get(model.dtype, HALF_TOLERANCE) * float(reference.abs().max().clamp_min(1e-3))
    if float((logits - reference).abs().max()) > limit:
        raise refuse(model, "its cross-attention is not a softmax over keys and values")


Seen = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _is_states(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:-1] == (1, rows)


@contextmanager
def _watching(model: nn.Module, rows: int) -> Iterator[dict[str, Seen]]:
    """Collects the modules with a config that are given encoder states, and how."""
    calls: dict[str, Seen] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) or not isinstance(
            getattr(module, "config", None), PreTrainedConfig
        ):
            continue

        def watch(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if any(_is_states(v, rows) for v in (*args, *kwargs.values())):
                calls[name] = (module, args, kwargs)

        hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _deepest(calls: dict[str, Seen]) -> dict[str, Seen]:
    return {n: c for n, c in calls.items() if not any(other.startswith(f"{n}.") for other in calls)}


def _layer(
    model: Any, name: str, module: nn.Module, args: Any, kwargs: Any, states: torch.Tensor, bridge: Any
) -> CrossLayer:
    """The layer, with the host's way of calling it: tensors other than hidden and encoder states are left out."""
    hidden: int | str = "hidden_states" if "hidden_states" in kwargs else 0
    width = (kwargs["hidden_states"] if hidden == "hidden_states" else args[0]).shape[-1]
    rows = states.shape[1]
    places: list[int | str] = [i for i, v in enumerate(args) if _is_states(v, rows)]
    places += [k for k, v in kwargs.items() if _is_states(v, rows)]
    if len(places) != 1 or places[0] == hidden:
        raise refuse(model, f"{name} is called in a way that is not understood")
    value = args[places[0]] if isinstance(places[0], int) else kwargs[places[0]]
    if torch.equal(value, states):
        bridge = None
    elif bridge is None or not torch.equal(value, bridge(states)) or rowwise_reason(bridge) is not None:
        raise refuse(model, f"{name} is given something else than the encoder's output")
    plain = tuple(None if isinstance(a, torch.Tensor) else a for a in args)
    named = {k: None if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return CrossLayer(
        name, module, Invocation(plain, named, hidden, places[0], width), bridge, states.shape[-1]
    )


def _check_reached(model: Any, layers: dict[str, CrossLayer], exact: Serving) -> None:
    missed = [n for n, layer in layers.items() if layer.module not in exact.recorded]
    if missed or len(exact.recorded) != len(layers) or any(c.calls != 1 for c in exact.recorded.values()):
        raise refuse(model, _HARD_CODED)


def _check_rows(model: Any, layer: CrossLayer, states: torch.Tensor) -> None:
    """Each row's key and value must be a function of that row alone."""
    reason = rowwise_reason(layer.module)
    if reason is not None:
        raise refuse(model, f"{layer.name}: {reason}")
    pairs = zip(layer.project(states), layer.project(states[:, 2:5]), strict=True)
    for whole, part in pairs:
        scale = float(whole.abs().max())
        if float((whole[:, :, 2:5] - part).abs().max()) > TOLERANCE.get(states.dtype, HALF_TOLERANCE) * scale:
            raise refuse(model, f"{layer.name} mixes rows of the encoder's output")
