"""Public statistics of a decoder-only model's attention to prefixes, from public prefixes and public questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity
from ...calibration.anchors.anchors_fit import candidates, fit_anchors
from ...calibration.anchors.objective import LayerProbe, Objective
from ...calibration.anchors.reply_divergence import Replies
from ...calibration.anchors.slots_fit import PublicContexts, SlotSettings
from ...calibration.calibration import Calibration
from ...calibration.calibration_options import CalibrationOptions
from ...calibration.kernel_fit import PublicQueries, Rows, fit_calibration
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import pool
from ..placeholder import new_tag
from ..public_prompts import choose_contexts
from ..routing import evaluating
from ..rows import layer_specs
from .attention import Call
from .cache import PrefixCache
from .contexts import SEGMENTS, Prefix, as_ids, read_prefixes
from .layers import PrefixLayer, prefix_fingerprint, rows_of, run_recorded
from .probing import find_layers, serving
from .replies import Asking, ask, end_ids, replying

GROUPING = {"row": "rows", "group": "segments", "context": "context"}
ENCODER_BATCH = 64
GATHER_BATCH = 32  # prefixes whose rows are in memory at a time
_EFFORT = 5e10  # numbers of context space that training passes: a few minutes on two cores
_SAMPLE = 256  # rows that are kept of longer contexts
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True)
class SoftmaxProbe(LayerProbe):
    """A layer that attends as the model does: logits may be capped, and rows of zeros are padding."""

    softcap: float | None = None

    def attend(
        self, rows: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        key, value = self.project(rows)
        logits = (queries.to(key) * self.scale).unsqueeze(0) @ key.mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if bias is not None:
            logits = logits + bias.to(key)[:, None, None, :]
        padding = (rows == 0).all(-1)
        return logits.masked_fill(padding[:, None, None, :], -torch.inf).softmax(-1) @ value


@torch.no_grad()
def calibrate_decoder(
    model: Any, public_contexts: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Calibration | AnchorCalibration:
    """See `hosts.calibrate.calibrate`. Queries are those of public questions, and of `query_steps` tokens sampled after each, behind
    `query_prompts` public prefixes."""
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigError(
            "Some weights of this model are offloaded (on the meta device), and a calibration reads and differentiates them: calibrate the "
            "model as it is loaded, then offload it."
        )
    settings = options.anchor_settings()
    anchored = config.mechanism == "anchors"
    if anchored:
        candidates(config, settings)  # refuses what cannot be before minutes are spent on it
    elif options.replies:
        raise ConfigError("replies train the decoder of `anchors`; kernel_sum has none.")
    with evaluating(model):
        layers = find_layers(model)
        prefixes = _prefixes(model, layers, public_contexts, config, options)
        asking = _asking(model, prefixes, options) if anchored and options.replies else None
        count = options.queries_of_texts()[0]
        head = _head_rows(model, layers, prefixes[0].head)
        # of anchors only what training reads is kept: prefixes are encoded again where it is gathered
        private = _encode(model, layers, prefixes[:count] if anchored else prefixes, options.progress)
        texts = _questions(model, options.questions)
        queries, own = _queries(model, layers, prefixes, private, head, texts, options)
        sketch = prefix_fingerprint(model, layers)
        gains = [output_gain(layer) for layer in layers.values()]
        if anchored:
            public_rows = torch.cat([head, own])
            probes = [
                SoftmaxProbe(layer.project, layer.scale, q, g.float(), layer.softcap)
                for layer, q, g in zip(layers.values(), queries, gains, strict=True)
            ]
            identity = HostIdentity(
                sketch.layers, sketch.sketch, sketch.dtype, torch.zeros(0, head.shape[-1])
            )
    if anchored:
        with ExitStack() as stack:
            logits, asked = None, None
            if asking is not None:
                offset = len(head) + prefixes[0].slots
                logits = stack.enter_context(replying(model, layers, head.float(), offset))
                asked = partial(
                    ask, logits, asking=asking, generator=torch.Generator().manual_seed(options.seed)
                )
            else:
                stack.enter_context(evaluating(model))
            contexts = _gather(
                model, layers, prefixes, public_rows, probes, asked, config.unit, options.progress
            )
            slots = _schedule(contexts, options.steps, options.seed)
            with torch.enable_grad():
                return fit_anchors(
                    config,
                    contexts,
                    Objective(probes, public_rows.float(), logits),
                    identity,
                    grouping=GROUPING[config.unit],
                    epsilons=options.epsilons,
                    settings=dataclasses.replace(settings, slots=slots),
                )
    whole = [torch.cat(parts) for parts in private]
    shapes = {tuple(len(part) for part in parts) for parts in private}
    if len(shapes) > 1:
        raise ConfigError(
            "A calibration of kernel_sum takes public prefixes of one shape: cut them to one length (for unit='group', to one number of "
            "segments of the same lengths)."
        )
    groups = None
    if config.unit == "group":
        lengths = torch.tensor(shapes.pop())
        groups = torch.arange(len(lengths)).repeat_interleave(lengths)

    def contexts_of_layers() -> Iterator[Rows]:
        for rows in whole:
            pairs = [layer.project(rows.float().unsqueeze(0)) for layer in layers.values()]
            yield [k[0] for k, _ in pairs], [v[0] for _, v in pairs]

    untyped: dict[str, Any] = dict(layers)
    return fit_calibration(
        config,
        layer_specs(untyped, model.dtype),
        contexts_of_layers,
        PublicQueries(queries, gains),
        count=len(whole),
        epsilons=options.epsilons,
        rank=options.rank,
        groups=groups,
        progress=options.progress,
    )


def _prefixes(
    model: Any,
    layers: dict[str, PrefixLayer],
    public: Any,
    config: DPXAttnConfig,
    options: CalibrationOptions,
) -> list[Prefix]:
    """The public prefixes to fit to, all with the same head. Raises ConfigError or ContextError where they are none."""
    if isinstance(public, (str, bytes)) or not len(public):
        raise ConfigError(
            "public_contexts of a decoder-only model are token ids [N, n] or a list of token id lists; for unit='group' (or where segments "
            "are encoded apart), a list of lists of segments."
        )
    apart = config.unit == "group" or _in_segments(public[0])
    size = model.get_input_embeddings().num_embeddings
    tokens = max(sum(map(len, c)) if apart else len(c) for c in public)
    channels = next(iter(layers.values())).cross_attention_dim
    # what `_gather` keeps of a prefix: as many numbers in units and outputs as in its rows, about
    kept = 4 * min(tokens, _SAMPLE) if config.mechanism == "anchors" and config.unit != "row" else tokens
    chosen = choose_contexts(public, 2 * kept * channels, options.memory_mb, options.seed)
    head, bucket, groups = options.public_head, options.prefix_bucket, SEGMENTS if apart else None
    prefixes = [read_prefixes(c, groups, head, bucket, size)[0] for c in chosen]
    if any(not torch.equal(p.head, prefixes[0].head) for p in prefixes):
        raise ConfigError("All public prefixes must begin with the same public head.")
    return prefixes


def _in_segments(context: Any) -> bool:
    """Whether a public context is a list of token id lists: units may be rows of segments that are encoded apart, too."""
    first = context[0] if isinstance(context, (list, tuple)) and context else None
    return isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) == 1


def _head_rows(model: Any, layers: dict[str, PrefixLayer], head: torch.Tensor) -> torch.Tensor:
    """The public head's rows [h, C], float16 on the CPU."""
    if not len(head):
        return torch.zeros(0, next(iter(layers.values())).cross_attention_dim, dtype=torch.float16)
    return rows_of(run_recorded(model, layers, head.unsqueeze(0)))[0].to("cpu", torch.float16)


def _encode(
    model: Any, layers: dict[str, PrefixLayer], prefixes: Sequence[Prefix], progress: bool
) -> list[list[torch.Tensor]]:
    """Each prefix's segments' rows [n, C], float16 on the CPU.

    Equal segments are run once, those of one length in batches (their rounding may depend on each other: they are public).
    """
    head = prefixes[0].head
    distinct = {tuple(s.tolist()): s for p in prefixes for s in p.segments}
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for key in distinct:
        by_length.setdefault(len(key), []).append(key)
    batches = [
        keys[i : i + ENCODER_BATCH] for keys in by_length.values() for i in range(0, len(keys), ENCODER_BATCH)
    ]
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for keys in tqdm(batches, desc="encoding", disable=not progress, leave=False):
        ids = torch.stack([torch.cat([head, distinct[key]]) for key in keys])
        rows = rows_of(run_recorded(model, layers, ids))[:, len(head) :].to("cpu", torch.float16)
        known.update(zip(keys, rows, strict=True))
    return [[known[tuple(s.tolist())] for s in p.segments] for p in prefixes]


def _units(parts: Sequence[torch.Tensor], unit: str) -> torch.Tensor:
    """[U, C]: what a release treats as one row each."""
    rows = torch.cat(list(parts))
    if unit == "row":
        return rows
    if unit == "context":
        return pool(rows.float(), unit, None).half()
    return torch.cat([pool(part.float(), "context", None) for part in parts]).half()


def _questions(model: Any, questions: Sequence[Any] | None) -> list[torch.Tensor]:
    """Public token ids of users' turns; where there are none, the BOS token."""
    size = model.get_input_embeddings().num_embeddings
    if questions is None:
        bos = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
        return [torch.tensor([bos if isinstance(bos, int) else 0])]
    texts = [as_ids(q, "a question", size) for q in questions]
    if not texts or not all(len(t) for t in texts):
        raise ConfigError("`questions` must be token id lists, none of them empty.")
    return texts


def _queries(
    model: Any,
    layers: dict[str, PrefixLayer],
    prefixes: Sequence[Prefix],
    private: Sequence[Sequence[torch.Tensor]],
    head: torch.Tensor,
    questions: Sequence[torch.Tensor],
    options: CalibrationOptions,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Public queries [H, m, d] of each layer, and one text's own rows [p, C], which stand beside the prefix where users' tokens will."""
    count, steps, wanted = options.queries_of_texts()
    generator = torch.Generator().manual_seed(options.seed)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    own = head[:0]
    for i, (prefix, parts) in enumerate(zip(prefixes[:count], private, strict=False)):
        rows = torch.cat([head, *parts]).to(model.device, model.dtype)
        offset = len(head) + prefix.slots
        ids = questions[i % len(questions)].to(model.device).unsqueeze(0)
        with serving(model, layers, rows.unsqueeze(0)) as calls:
            first = calls.current
            assert first is not None
            for _ in range(steps + 1):
                call = Call(first.tables, first.index, offset, ids.shape[1], queries={})
                calls.current = call
                cache = PrefixCache([new_tag()], offset, len(layers))
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
                drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
                ids = torch.cat([ids, drawn.to(ids).unsqueeze(0)], dim=1)
        assert call.queries is not None
        for name, (query,) in call.queries.items():
            found[name].append(query[0].to("cpu", torch.float32))
        if i == 0:
            layered: list[Any] = cache.layers
            pairs = [t.transpose(1, 2).flatten(2) for c in layered for t in (c.keys, c.values)]
            own = torch.cat(pairs, dim=-1)[0].to("cpu", torch.float16)
    queries = []
    for parts in found.values():
        flat = torch.cat(parts, dim=1)
        keep = torch.randperm(flat.shape[1], generator=generator)[:wanted]
        queries.append(flat[:, keep])
    return queries, own


def _gather(
    model: Any,
    layers: dict[str, PrefixLayer],
    prefixes: Sequence[Prefix],
    public_rows: torch.Tensor,
    probes: Sequence[SoftmaxProbe],
    asked: Callable[[torch.Tensor], Replies] | None,
    unit: str,
    progress: bool,
) -> PublicContexts:
    """Units and rows of all prefixes, encoded some at a time, and what the model replies behind each (`asked`). Of long prefixes (the
    longest decides) the exact attention to public queries is kept and a sample of their rows; short ones stay as they are: their attention
    is cheaper to compute again than to keep.
    """
    length = len(public_rows) + max(sum(map(len, p.segments)) for p in prefixes)
    units: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    outputs: list[list[torch.Tensor]] = [[] for _ in probes]
    replies: list[Replies] = []
    starts = range(0, len(prefixes), GATHER_BATCH)
    for start in tqdm(starts, desc="public prefixes", disable=not progress, leave=False):
        private = _encode(model, layers, prefixes[start : start + GATHER_BATCH], progress=False)
        units += [_units(parts, unit) for parts in private]
        if asked is not None:
            replies += [asked(torch.cat(parts).float()) for parts in private]
        rows = [torch.cat([public_rows, *parts]) for parts in private]
        if length > _SAMPLE:
            for kept, probe in zip(outputs, probes, strict=True):
                kept += exact_outputs(rows, probe)
            # spread over the whole of every prefix, however long it is
            rows = [r[torch.arange(_SAMPLE) * len(r) // _SAMPLE] for r in rows]
        whole += rows
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(u), dtype=torch.bool) for u in units], batch_first=True)
    return PublicContexts(
        nn.utils.rnn.pad_sequence(units, batch_first=True),
        mask,
        nn.utils.rnn.pad_sequence(whole, batch_first=True),
        tuple(torch.stack(kept) for kept in outputs) if length > _SAMPLE else None,
        length if length > _SAMPLE else None,
        Replies.cat(replies) if replies else None,
    )


def _asking(model: Any, prefixes: Sequence[Prefix], options: CalibrationOptions) -> Asking:
    """What is asked of every prefix. Raises ConfigError where there are no questions, or where they would stand at several positions."""
    if options.questions is None:
        raise ConfigError(
            "replies are those to `questions`: pass some, with the tokens that open a reply at their end."
        )
    if options.replies < 0:
        raise ConfigError(f"replies must not be negative, got {options.replies}.")
    if len({p.slots for p in prefixes}) > 1:
        raise ConfigError("replies ask for public prefixes of one padded length: pass prefix_bucket.")
    steps = options.queries_of_texts()[1]
    return Asking(_questions(model, options.questions), options.replies, steps, end_ids(model))


def exact_outputs(rows: Sequence[torch.Tensor], probe: SoftmaxProbe, batch: int = 4) -> list[torch.Tensor]:
    """Attention of a layer's public queries to contexts of several lengths [n, C]: for each [H, m, dv] in float16."""
    found: list[torch.Tensor] = []
    for start in range(0, len(rows), batch):
        padded = nn.utils.rnn.pad_sequence(list(rows[start : start + batch]), batch_first=True)
        found += probe.attend(padded.float(), probe.queries).half()
    return found


def _schedule(contexts: PublicContexts, steps: int | None, seed: int) -> SlotSettings:
    """Batches that long prefixes can afford."""
    usual = SlotSettings(seed=seed)
    each = contexts.whole[0].numel() + contexts.units[0].numel()
    batch = max(8, min(usual.batch, int(4e7 / each)))
    affordable = max(200, min(usual.steps, int(_EFFORT / (batch * each))))
    return dataclasses.replace(usual, batch=batch, steps=affordable if steps is None else steps)


@torch.no_grad()
def output_gain(layer: PrefixLayer) -> torch.Tensor:
    """[H] mean squared gain from a key head's output channel to the module's output; ones where its last projection is not known."""
    width = layer.query_heads * layer.value_dim
    for name in _OUTPUTS:
        module: Any = getattr(layer.module, name, None)
        module = getattr(module, "base_layer", module)
        if type(module) is nn.Linear and module.in_features == width:
            weight = module.weight
        elif type(module) is Conv1D and module.weight.shape[0] == width:
            weight = module.weight.mT
        else:
            continue
        squares = weight.detach().to("cpu", torch.float64).square().sum(0)
        return squares.reshape(layer.heads, -1).mean(1)
    return torch.ones(layer.heads, dtype=torch.float64)
