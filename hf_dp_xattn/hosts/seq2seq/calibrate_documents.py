"""Public contexts of documents that are encoded apart from each other: pooled units, exact attention over all of their rows, typical rows.

Memory is bounded: a context of thousands of documents is kept as one mean row per document and the attention of the public queries over all
of its rows. Equal documents are encoded once. The decoder's slots start from *typical rows*: k-means of rows drawn in proportion to the
attention that public queries pay to them (most rows of a document are never looked at, and where attention is peaked a slot that nobody
looks at does not learn).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ...calibration.anchors.anchors_calibration import AnchorCalibration, HostIdentity
from ...calibration.anchors.anchors_fit import MINIMUM_CONTEXTS, AnchorSettings, fit_anchors
from ...calibration.anchors.documents_fit import CELLS, document_plans, fit_documents, influences
from ...calibration.anchors.kmeans import kmeans
from ...calibration.anchors.objective import LayerProbe, Objective
from ...calibration.anchors.slots_fit import PublicContexts, SlotSettings
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.anchors import pool
from ...mechanisms.anchors.plan import Decoders
from ..access import Access
from ..public_prompts import choose_contexts
from .contexts import MASK, STATES, gather
from .encoder import EncoderSide
from .probing import context_channels

TYPICAL_CONTEXTS = 32
DRAWS = 512  # rows of a context that are drawn for the typical ones
SAMPLE = 6144  # public documents that cells are made of
QUERY_ROWS = 4096  # rows of a context while public queries are collected
ENCODER_ROWS = 8192
QUERY_CHUNK = 128
MANY = 64  # documents from which a sum is always ahead of one answer for each
KNOWN = ("input_ids", "inputs_embeds", STATES)
NEEDS = (
    "public_contexts for unit='group' is a list of contexts, each a batch of documents as `protected.release(..., groups='documents')` "
    "takes it: token ids [d, L], or input_ids with attention_mask, or rows of the encoder's output [d, L, C]"
)


class DocumentReader:
    """Encodes public contexts one after the other; keeps the rows of documents of token ids that may come again, `memory_mb` of them."""

    def __init__(self, model: Any, memory_mb: int) -> None:
        self._encoder = EncoderSide(model, Access())
        self._known: dict[bytes, torch.Tensor] = {}
        self._room = memory_mb * 2**20
        self._held = 0

    def check(self, context: Any) -> tuple[torch.Tensor, torch.Tensor, str]:
        """(documents, their mask [d, L], the name of the encoder's input).

        Raises:
            ConfigError: not a batch of documents.
        """
        inputs = gather(context)
        self._encoder.check(inputs)
        name = next(k for k in inputs if k != MASK)
        main = inputs[name]
        if name not in KNOWN or main.ndim != (2 if name == "input_ids" else 3) or not len(main):
            raise ConfigError(NEEDS + ".")
        mask = inputs.get(MASK)
        mask = torch.ones(main.shape[:2], dtype=torch.bool) if mask is None else mask.to("cpu", torch.bool)
        if mask.shape != main.shape[:2] or not bool(mask.any(1).all()):
            raise ConfigError(NEEDS + f"; a mask of shape {list(mask.shape)} that leaves a row of each.")
        return main, mask, name

    def read(self, context: Any) -> list[torch.Tensor]:
        """Each document's rows [rows, C], float16 on the CPU."""
        main, mask, name = self.check(context)
        if name == STATES:
            return [d[m].to("cpu", torch.float16) for d, m in zip(main, mask, strict=True)]
        if name != "input_ids":
            return list(self._encode(name, main, mask))
        names = [d[m].numpy().tobytes() for d, m in zip(main.to("cpu", torch.int64), mask, strict=True)]
        new = list({n: i for i, n in enumerate(names) if n not in self._known}.values())
        if new:
            index = torch.tensor(new)
            self._known |= zip(
                (names[i] for i in new), self._encode(name, main[index], mask[index]), strict=True
            )
        found = [self._known[n] for n in names]
        self._held += sum(found[i].numel() * 2 for i in new)
        if self._held > self._room:
            self._known, self._held = {}, 0
        return found

    def _encode(self, name: str, main: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        """In batches: their rounding may depend on each other, they are public."""
        size = max(1, ENCODER_ROWS // main.shape[1])
        for part, kept in zip(main.split(size), mask.split(size), strict=True):
            states = self._encoder.encode_batch({name: part, MASK: kept.long()}).to("cpu", torch.float16)
            yield from (s[m] for s, m in zip(states, kept, strict=True))


def choose(model: Any, public: Any, width: int, memory_mb: int, seed: int) -> list[Any]:
    """The public contexts to fit to, by the memory that one takes; width: numbers kept beside its units.

    Raises:
        ConfigError: not a list of contexts.
    """
    if isinstance(public, (str, dict)) or not hasattr(public, "__len__") or not len(public):
        raise ConfigError(NEEDS + ".")
    documents = max(len(DocumentReader(model, 0).check(c)[0]) for c in list(public)[:8])
    return choose_contexts(public, 2 * (documents * context_channels(model) + width), memory_mb, seed)


@dataclass(frozen=True)
class Gathered:
    """contexts: see the module. rows [D, L, C], mask [D, L], means [D, C]: public documents. normalizers: each layer's mean log
    normaliser [H, m] over public contexts."""

    contexts: PublicContexts
    rows: torch.Tensor
    mask: torch.Tensor
    means: torch.Tensor
    normalizers: tuple[torch.Tensor, ...]


def gather_documents(
    reader: DocumentReader, chosen: Sequence[Any], probes: Sequence[LayerProbe], *, seed: int, progress: bool
) -> Gathered:
    """Units, outputs, typical rows and some documents of public contexts; each is encoded, read and left behind."""
    generator = torch.Generator().manual_seed(seed)
    means: list[torch.Tensor] = []
    drawn, outputs, normalizers, sample = [], [], [], []
    for context in tqdm(chosen, desc="documents", disable=not progress, leave=False):
        documents = reader.read(context)
        rows = torch.cat(documents).float()
        owner = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(d) for d in documents]))
        means.append(pool(rows, "group", owner).half())
        found = [_exact(p, rows) for p in probes]
        outputs.append([out.half() for out, _, _ in found])
        if len(means) <= TYPICAL_CONTEXTS:
            seen = torch.stack([mass for _, _, mass in found]).mean(0)
            drawn.append(rows[torch.multinomial(seen, DRAWS, replacement=True, generator=generator)])
            normalizers.append([level for _, level, _ in found])
        some = torch.randperm(len(documents), generator=generator)[: -(-SAMPLE // len(chosen))]
        sample += [documents[i] for i in some.tolist()]
    units = torch.nn.utils.rnn.pad_sequence(means, batch_first=True)
    counts = torch.tensor([len(m) for m in means])
    slots = slots_for(SlotSettings(), units.shape[1]).slots
    typical = typical_rows(torch.cat(drawn), slots, seed).half()
    contexts = PublicContexts(
        units,
        torch.arange(units.shape[1]) < counts.unsqueeze(1),
        typical.expand(len(means), -1, -1),
        tuple(torch.stack(layer) for layer in zip(*outputs, strict=True)),
    )
    lengths = torch.tensor([len(d) for d in sample])
    return Gathered(
        contexts,
        torch.nn.utils.rnn.pad_sequence(sample, batch_first=True),
        torch.arange(int(lengths.max())) < lengths.unsqueeze(1),
        torch.stack([pool(d.float(), "context", None)[0].float() for d in sample]),
        tuple(torch.stack(layer).mean(0) for layer in zip(*normalizers, strict=True)),
    )


def typical_rows(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, C] centres of rows [N, C], in which the same row may stand often; rows themselves where they are too few or too alike."""
    try:
        return kmeans(rows, count, seed=seed, per_cell=1)
    except ConfigError:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def _exact(probe: LayerProbe, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of the public queries over all rows [n, C]: outputs [H, m, dv], log normalisers [H, m], the mean weight [n] of each row."""
    key, value = probe.project(rows.unsqueeze(0))
    parts, levels, mass = [], [], torch.zeros(len(rows))
    for q in probe.queries.split(QUERY_CHUNK, dim=1):
        logits = q @ key[0].mT * probe.scale
        weights = torch.softmax(logits, dim=-1)
        parts.append(weights @ value[0])
        levels.append(torch.logsumexp(logits, dim=-1))
        mass += weights.sum((0, 1))
    return torch.cat(parts, dim=1), torch.cat(levels, dim=1), mass / mass.sum()


def slots_for(schedule: SlotSettings, documents: int) -> SlotSettings:
    """Contexts of many documents hold more that adds up than a prompt does: wider codes; smaller batches keep the time."""
    if documents < MANY:
        return schedule
    batch = max(16, min(schedule.batch, 65_536 // documents))
    return dataclasses.replace(schedule, code=128, slots=128, directions=32, batch=batch)


def fit_documents_of(
    config: DPXAttnConfig,
    gathered: Gathered,
    objective: Objective,
    host: HostIdentity,
    *,
    epsilons: Sequence[float],
    settings: AnchorSettings,
) -> AnchorCalibration:
    """The candidates that are asked for, and for each epsilon the one with the least FVU on held-out public contexts.

    Raises:
        ConfigError: too few contexts, or too few distinct documents.
    """
    contexts = gathered.contexts
    kinds = releases_for(settings.releases, contexts.units.shape[1])
    found: AnchorCalibration | None = None
    if set(kinds) - {"histogram", "mixed"}:
        found = fit_anchors(
            config,
            contexts,
            objective,
            host,
            grouping="rows",
            epsilons=epsilons,
            settings=dataclasses.replace(settings, releases=kinds),
        )
    if "histogram" not in kinds and found is not None:
        return found
    if len(contexts) < MINIMUM_CONTEXTS:
        raise ConfigError(
            f"A calibration of anchors needs at least {MINIMUM_CONTEXTS} public contexts, got {len(contexts)}; thousands do better."
        )
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(settings.seed))
    held = min(settings.validation, len(contexts) // 6)
    typical = [o.float().mean(0) for o in contexts.outputs or ()]
    generator = torch.Generator().manual_seed(settings.seed)
    sketch, mass = influences(
        objective.layers, typical, gathered.normalizers, gathered.rows, gathered.mask, generator
    )
    book = fit_documents(
        contexts.part(order[held:]),
        gathered.means,
        sketch,
        mass,
        gathered.rows,
        cells=min(settings.anchors, CELLS),
        seed=settings.seed,
    )
    plans = document_plans(
        config, book, contexts.part(order[:held]), objective, sorted(map(float, epsilons)), settings.seed
    )
    tried = [{"epsilon": p.epsilon, "release": p.release, "fvu": round(p.quality.fvu, 4)} for p in plans]
    if found is not None:
        tried = found.settings["candidates"] + tried
        plans = [min(pair, key=lambda p: p.quality.fvu) for pair in zip(plans, found.plans, strict=True)]
    used = {p.release for p in plans}
    calibration = AnchorCalibration(
        unit=config.unit,
        neighboring=config.neighboring,
        grouping="rows",
        channels=contexts.whole.shape[-1],
        contexts=len(contexts),
        units=contexts.mask.shape[1],
        settings={
            **({} if found is None else found.settings),
            "delta": config.delta,
            "releases": list(kinds),
            "anchors": len(book.codes),
            "seed": settings.seed,
            "candidates": tried,
        },
        host=host,
        plans=tuple(plans),
        decoders=Decoders(
            found.decoders.slots if found is not None and used & {"sum", "response"} else None,
            book.decoder if "histogram" in used else None,
        ),
    ).rounded()
    calibration.verify()
    return calibration


def releases_for(releases: Sequence[str], documents: int) -> tuple[str, ...]:
    """Without the answers for each document where a sum can be had."""
    many = documents >= MANY and "sum" in releases
    return tuple(r for r in releases if not (many and r == "response"))
