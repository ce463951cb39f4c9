"""Public prompts of any pipeline whose denoiser reads text by cross-attention, and the queries of its own calls on them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...calibration.anchors.anchors_calibration import GROUPINGS
from ...calibration.anchors.objective import Objective
from ...calibration.anchors.slot_schedule import is_large
from ...calibration.anchors.slots_fit import PublicContexts
from ...calibration.calibration_options import CalibrationOptions
from ...calibration.public_data import PublicData, choose_contexts, pooled
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ..identity import host_identity
from ..layer import layer_probes, row_flops
from ..random_states import random_kept
from ..text.prompt_swap import no_progress
from .intercepted import Attention, ServedForward
from .rows_host import RowsHost, placed_host
from .rows_public import rows_objective
from .text_layers import TextLayer


@contextmanager
def placed_public(
    pipe: Any, public: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Iterator[PublicData]:
    """What public prompts give. See `hosts.calibrate.calibrate`."""
    host = placed_host(pipe)
    grouping = options.grouping or {"row": "rows", "context": "context"}.get(config.unit, "phrases")
    if config.unit == "group" or grouping not in GROUPINGS[config.unit]:
        raise ConfigError("A calibration for this pipeline is for unit='row' or unit='context'.")
    if (
        isinstance(public, (str, torch.Tensor))
        or not len(public)
        or not all(isinstance(t, str) for t in public)
    ):
        raise ConfigError("public_contexts must be a list of prompts.")
    encoder = host.encoder_for(pipe)
    chosen = choose_contexts(public, 2 * encoder.rows * encoder.channels, options.memory_mb, options.seed)
    rows = [
        encoder.read(text).to("cpu", torch.float32)
        for text in options.progress.track(chosen, "encoding", len(chosen))
    ]
    if isinstance(host, RowsHost):
        host.check_mechanism(config)
        objective = rows_objective(host.encoder_for(pipe), rows, options)
        yield PublicData(
            objective,
            grouping,
            host=host_identity([host.input], host.model.dtype, encoder),
            contexts=_contexts(rows, config.unit),
        )
        return
    layers = host.text_layers
    flops = row_flops(layers.values())
    large = is_large(flops)
    count = (2 if large else 8) if options.query_prompts is None else options.query_prompts
    steps = (4 if large else 6) if options.query_steps is None else options.query_steps
    queries = public_queries(pipe, layers, chosen[:count], steps, options)
    objective = Objective(layer_probes(layers.values(), queries), encoder.first.to("cpu", torch.float32))
    dtype = next(iter(layers.values())).module.to_q.weight.dtype
    if config.mechanism == "anchors":
        yield PublicData(
            objective,
            grouping,
            host=host_identity(layers.values(), dtype, encoder),
            contexts=_contexts(rows, config.unit),
            row_flops=flops,
            validation=128 if large else 400,
        )
        return
    specs = [layer.spec(dtype) for layer in layers.values()]
    yield PublicData(objective, grouping, rows=lambda: rows, count=len(rows), specs=specs)


def _contexts(rows: Sequence[torch.Tensor], unit: str) -> PublicContexts:
    """Contexts of any lengths. Where their attention counts, shorter ones are repeated up to the longest: a softmax is about the same."""
    units = [pooled(r, unit).half() for r in rows]
    lengths = torch.tensor([len(u) for u in units])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    longest = max(len(r) for r in rows)
    whole = [r[torch.arange(longest) % len(r)] for r in rows]
    return PublicContexts(pad_sequence(units, batch_first=True), mask, torch.stack(whole).half())


@torch.no_grad()
def public_queries(
    pipe: Any, layers: dict[str, TextLayer], prompts: Sequence[str], steps: int, options: CalibrationOptions
) -> list[torch.Tensor]:
    """Queries [H, m, d] of each layer along public calls of the pipeline, all of it its own.

    Raises:
        ConfigError: a call needs more than a prompt (a picture to start from, ...).
    """
    gen = torch.Generator().manual_seed(options.seed)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def note(name: str, states: Any, call: Attention) -> torch.Tensor:
        index = torch.randperm(call.query.shape[2], generator=gen)[: options.queries_per_step]
        some = call.query[:, :, index.to(call.query.device)]
        seen[name].append(some.transpose(0, 1).flatten(1, 2).to("cpu", torch.float32))
        return call.exact()

    takes = inspect.signature(type(pipe).__call__).parameters
    arguments = {"num_inference_steps": steps, "output_type": "latent", "use_resolution_binning": False}
    with ExitStack() as stack:
        for name, layer in layers.items():
            served = ServedForward(name, layer.module, note)
            served.install()
            stack.callback(served.remove)
        stack.enter_context(no_progress(pipe))
        stack.enter_context(random_kept())
        for i, prompt in enumerate(options.progress.track(prompts, "public queries", len(prompts))):
            torch.manual_seed(options.seed + i)
            try:
                pipe(prompt=prompt, **{n: v for n, v in arguments.items() if n in takes})
            except Exception as error:
                raise ConfigError(
                    f"{type(pipe).__name__} could not be called with a public prompt alone ({type(error).__name__}: {error}). Calibrate "
                    "the text-to-image pipeline with the same parts."
                ) from error
    return [torch.cat(queries, dim=1) for queries in seen.values()]
