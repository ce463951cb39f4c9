"""Public prefixes of a decoder-only model, encoded once, and public questions behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from ....calibration.anchors.anchors_calibration import HostIdentity
from ....calibration.anchors.objective import LayerProbe, Objective
from ....calibration.anchors.reply_divergence import Replies
from ....calibration.anchors.slots_fit import PublicContexts
from ....calibration.calibration_options import CalibrationOptions
from ....calibration.checkpoints import digest
from ....calibration.public_data import PublicData, choose_contexts, pooled
from ....config import DPXAttnConfig
from ....errors import ConfigError
from ...encode_once import EncodeOnce
from ...placeholder import new_tag
from ...private_run import evaluating
from .prefix_attention import Call
from .prefix_cache import PrefixCache
from .prefix_contexts import SEGMENTS, Prefix, as_ids, read_prefixes
from .prefix_layers import PrefixLayer, prefix_fingerprint, rows_of, run_recorded
from .prefix_probing import find_layers, serving
from .replies import Asking, ask, end_ids, replying

GROUPING = {"row": "rows", "group": "segments", "context": "context"}
ENCODER_BATCH = 64
GATHER_BATCH = 32  # prefixes whose rows are in memory at a time
ASKED = 8  # prefixes that are asked at once
_SAMPLE = 256  # rows that are kept of longer contexts


@dataclass(frozen=True)
class SoftmaxProbe(LayerProbe):
    """A layer that attends as the model does: logits may be capped, and rows of zeros are padding."""

    softcap: float | None = None

    def attend(
        self, rows: torch.Tensor, queries: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        padding = torch.zeros(rows.shape[:2]).masked_fill((rows == 0).all(-1), -torch.inf)
        return self.attend_to(*self.keys_values(rows), queries, padding if bias is None else bias + padding)

    def attend_to(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits = (queries.to(key) * self.scale).unsqueeze(0) @ key.mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if bias is not None:
            logits = logits + bias.to(key)[:, None, None, :]
        return logits.softmax(-1) @ value


@contextmanager
def public_prefixes(
    model: Any, public: Any, config: DPXAttnConfig, options: CalibrationOptions
) -> Iterator[PublicData]:
    """What public prefixes give; while it lasts, the model can be asked for replies. See `hosts.calibrate.calibrate`.

    Queries are those of public questions, and of tokens sampled after each, behind some of the prefixes.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigError(
            "Some weights of this model are offloaded (on the meta device), and a calibration reads and differentiates them: calibrate the "
            "model as it is loaded, then offload it."
        )
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        with torch.no_grad():
            layers = find_layers(model)
            reader = PrefixReader(model, layers, options)
            prefixes = _prefixes(model, layers, public, config, options)
            head = reader.head(prefixes[0])
            if config.mechanism == "anchors":
                data = _contexts_data(reader, prefixes, head, config, options, stack)
            else:
                data = _rows_data(reader, prefixes, head, config, options)
        yield data


class PrefixReader:
    """Encodes public prefixes; equal segments once, as long as a quarter of `memory_mb` holds them."""

    def __init__(self, model: Any, layers: dict[str, PrefixLayer], options: CalibrationOptions) -> None:
        self.model, self.layers = model, layers
        self._kept = options.kept
        self._known = EncodeOnce(options.memory_mb // 4)

    def head(self, prefix: Prefix) -> torch.Tensor:
        """The public head's rows [h, C], float16 on the CPU."""
        if not len(prefix.head):
            return torch.zeros(0, next(iter(self.layers.values())).channels, dtype=torch.float16)
        rows = rows_of(run_recorded(self.model, self.layers, prefix.head.unsqueeze(0)))
        return rows[0].to("cpu", torch.float16)

    def read(self, prefixes: Sequence[Prefix]) -> list[list[torch.Tensor]]:
        """Each prefix's segments' rows [n, C], float16 on the CPU."""
        head = prefixes[0].head
        texts = [segment for prefix in prefixes for segment in prefix.segments]

        def encode(new: list[int]) -> list[torch.Tensor]:
            """Those of one length in batches (their rounding may depend on each other: they are public)."""
            by_length: dict[int, list[int]] = {}
            for i in new:
                by_length.setdefault(len(texts[i]), []).append(i)
            batches = [
                alike[i : i + ENCODER_BATCH]
                for alike in by_length.values()
                for i in range(0, len(alike), ENCODER_BATCH)
            ]
            name = "" if self._kept.folder is None else digest("rows", [texts[i] for i in new])
            stored = self._kept.read(name)
            if stored is not None:
                return [stored[str(i)] for i in range(len(new))]
            rows: dict[int, torch.Tensor] = {}
            for batch in batches:
                ids = torch.stack([torch.cat([head, texts[i]]) for i in batch])
                states = rows_of(run_recorded(self.model, self.layers, ids))[:, len(head) :]
                rows.update(zip(batch, states.to("cpu", torch.float16), strict=True))
            self._kept.keep(name, {str(i): rows[at] for i, at in enumerate(new)})
            return [rows[i] for i in new]

        segments = iter(self._known.rows([tuple(t.tolist()) for t in texts], encode))
        return [[next(segments) for _ in prefix.segments] for prefix in prefixes]


def _contexts_data(
    reader: PrefixReader,
    prefixes: Sequence[Prefix],
    head: torch.Tensor,
    config: DPXAttnConfig,
    options: CalibrationOptions,
    stack: ExitStack,
) -> PublicData:
    """For `anchors`; what keeps the model ready for replies goes on the stack."""
    model, layers = reader.model, reader.layers
    asking = _asking(model, prefixes, options) if options.replies else None
    chunks = [prefixes[i : i + GATHER_BATCH] for i in range(0, len(prefixes), GATHER_BATCH)]
    # of these the queries are sampled, which the gathering of all of them needs
    first = [reader.read(chunk) for chunk in chunks[: -(-options.texts // GATHER_BATCH)]]
    queries, suffix_rows = _queries(model, layers, prefixes, list(chain(*first)), head, options)
    probes = _probes(layers, queries)
    public_rows = torch.cat([head, suffix_rows])
    sketch = prefix_fingerprint(model, layers)
    host = HostIdentity(sketch.layers, sketch.sketch, sketch.dtype, torch.zeros(0, head.shape[-1]))
    logits, asked = None, None
    if asking is not None:
        logits = stack.enter_context(replying(model, layers, head.float(), len(head) + prefixes[0].slots))
        generator = torch.Generator().manual_seed(options.seed)
        asked = partial(ask, logits, asking=asking, generator=generator)
    bar = options.progress.track(
        chain(first, map(reader.read, chunks[len(first) :])), "public prefixes", len(chunks)
    )
    longest = max(sum(map(len, p.segments)) for p in prefixes)
    contexts = _gather(bar, len(public_rows) + longest, public_rows, probes, asked, config.unit)
    return PublicData(
        Objective(probes, public_rows.float(), logits), GROUPING[config.unit], host=host, contexts=contexts
    )


def _rows_data(
    reader: PrefixReader,
    prefixes: Sequence[Prefix],
    head: torch.Tensor,
    config: DPXAttnConfig,
    options: CalibrationOptions,
) -> PublicData:
    """For `kernel_sum`. Raises ConfigError where prefixes differ in shape."""
    model, layers = reader.model, reader.layers
    chunks = [prefixes[i : i + GATHER_BATCH] for i in range(0, len(prefixes), GATHER_BATCH)]
    private = list(chain(*map(reader.read, options.progress.track(chunks, "encoding"))))
    shapes = {tuple(len(part) for part in parts) for parts in private}
    if len(shapes) > 1:
        raise ConfigError(
            "A calibration of kernel_sum takes public prefixes of one shape: cut them to one length (for unit='group', to one number of "
            "segments of the same lengths)."
        )
    queries, _ = _queries(model, layers, prefixes, private, head, options)
    lengths = torch.tensor(shapes.pop())
    return PublicData(
        Objective(_probes(layers, queries), head[:0]),
        GROUPING[config.unit],
        specs=[layer.spec(model.dtype) for layer in layers.values()],
        rows=lambda: (torch.cat(parts).float() for parts in private),
        count=len(private),
        groups=torch.arange(len(lengths)).repeat_interleave(lengths) if config.unit == "group" else None,
    )


def _probes(layers: dict[str, PrefixLayer], queries: Sequence[torch.Tensor]) -> list[SoftmaxProbe]:
    return [
        SoftmaxProbe(layer.project, layer.scale, q, layer.output_gain(), layer.softcap)
        for layer, q in zip(layers.values(), queries, strict=True)
    ]


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
    channels = next(iter(layers.values())).channels
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
    options: CalibrationOptions,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Public queries [H, m, d] of each layer, and one text's own rows [p, C], which stand beside the prefix where users' tokens will."""
    questions = _questions(model, options.questions)
    generator = torch.Generator().manual_seed(options.seed)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    suffix_rows = head[:0]
    for i, (prefix, parts) in enumerate(zip(prefixes[: options.texts], private, strict=False)):
        rows = torch.cat([head, *parts]).to(model.device, model.dtype)
        offset = len(head) + prefix.slots
        ids = questions[i % len(questions)].to(model.device).unsqueeze(0)
        with serving(model, layers, rows.unsqueeze(0)) as calls:
            first = calls.current
            assert first is not None
            for _ in range(options.tokens + 1):
                call = Call(first.tables, first.index, offset, ids.shape[1], queries={})
                calls.current = call
                cache = PrefixCache([new_tag()], offset, len(layers), trial=True)
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
                drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)
                ids = torch.cat([ids, drawn.to(ids).unsqueeze(0)], dim=1)
        assert call.queries is not None
        for name, (query,) in call.queries.items():
            seen[name].append(query[0].to("cpu", torch.float32))
        if i == 0:
            layered: list[Any] = cache.layers
            pairs = [t.transpose(1, 2).flatten(2) for c in layered for t in (c.keys, c.values)]
            suffix_rows = torch.cat(pairs, dim=-1)[0].to("cpu", torch.float16)
    queries = []
    for parts in seen.values():
        flat = torch.cat(parts, dim=1)
        keep = torch.randperm(flat.shape[1], generator=generator)[: options.queries]
        queries.append(flat[:, keep])
    return queries, suffix_rows


def _gather(
    chunks: Iterable[list[list[torch.Tensor]]],
    length: int,
    public_rows: torch.Tensor,
    probes: Sequence[SoftmaxProbe],
    asked: Callable[[Sequence[torch.Tensor]], Replies] | None,
    unit: str,
) -> PublicContexts:
    """Units and rows of all prefixes, some at a time, and what the model replies behind each.

    Of long prefixes (the longest decides) the exact attention to public queries is kept and a sample of their rows; short ones stay as they
    are: their attention is cheaper to compute again than to keep.

    Args:
        chunks: each prefix's segments' rows [n, C].
        length: rows of the longest prefix, public ones included.
        public_rows: [p, C], those before every prefix's own.
        probes: the layers, with all of their public queries.
        asked: gives the replies behind some prefixes' rows, if any are wanted.
        unit: what one neighbouring step replaces.
    """
    units: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    outputs: list[list[torch.Tensor]] = [[] for _ in probes]
    replies: list[Replies] = []
    for private in chunks:
        for parts in private:
            owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
            units.append(pooled(torch.cat(parts), unit, owner if unit == "group" else None))
        if asked is not None:
            some = [private[i : i + ASKED] for i in range(0, len(private), ASKED)]
            replies += [asked([torch.cat(parts).float() for parts in each]) for each in some]
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
    return Asking(_questions(model, options.questions), options.replies, options.tokens, end_ids(model))


def exact_outputs(rows: Sequence[torch.Tensor], probe: SoftmaxProbe, batch: int = 4) -> list[torch.Tensor]:
    """Attention of a layer's public queries to contexts of several lengths [n, C]: for each [H, m, dv] in float16."""
    outputs: list[torch.Tensor] = []
    for start in range(0, len(rows), batch):
        padded = nn.utils.rnn.pad_sequence(list(rows[start : start + batch]), batch_first=True)
        outputs += probe.attend(padded.float(), probe.queries).half()
    return outputs
