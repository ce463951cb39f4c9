"""Public contexts of documents that are encoded apart from each other: pooled units, a sample of their rows, and exact attention over all.

Memory is bounded: a context of thousands of documents is kept as one mean row per document, `MEMBERS` rows at most, and the attention of
the public queries over all of its rows. Equal documents are encoded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ...calibration.anchors.objective import LayerProbe
from ...calibration.anchors.slots_fit import PublicContexts, SlotSettings
from ...errors import ConfigError
from ...mechanisms.anchors.release import pool
from ..access import Access
from ..calibrate_anchors import choose_contexts
from .contexts import MASK, STATES, gather
from .encoder import EncoderSide
from .probing import context_channels

MEMBERS = 256  # rows of a context that are kept: where the decoder's rows start from
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


def gather_documents(
    reader: DocumentReader, chosen: Sequence[Any], probes: Sequence[LayerProbe], *, seed: int, progress: bool
) -> PublicContexts:
    """Units, members and outputs of public contexts; each is encoded, read and left behind."""
    generator = torch.Generator().manual_seed(seed)
    means, members, outputs = [], [], []
    for context in tqdm(chosen, desc="documents", disable=not progress, leave=False):
        documents = reader.read(context)
        rows = torch.cat(documents).float()
        owner = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(d) for d in documents]))
        means.append(pool(rows, "group", owner).half())
        members.append(rows[torch.randperm(len(rows), generator=generator)[:MEMBERS]].half())
        outputs.append([_exact(p, rows) for p in probes])
    least = min(len(m) for m in members)
    units = torch.nn.utils.rnn.pad_sequence(means, batch_first=True)
    counts = torch.tensor([len(m) for m in means])
    return PublicContexts(
        units,
        torch.arange(units.shape[1]) < counts.unsqueeze(1),
        torch.stack([m[:least] for m in members]),
        tuple(torch.stack(layer) for layer in zip(*outputs, strict=True)),
    )


def _exact(probe: LayerProbe, rows: torch.Tensor) -> torch.Tensor:
    """[H, m, dv] float16: attention of the public queries over all rows [n, C]."""
    key, value = probe.project(rows.unsqueeze(0))
    parts = [
        torch.softmax(q @ key[0].mT * probe.scale, dim=-1) @ value[0]
        for q in probe.queries.split(QUERY_CHUNK, dim=1)
    ]
    return torch.cat(parts, dim=1).half()


def slots_for(schedule: SlotSettings, documents: int) -> SlotSettings:
    """Contexts of many documents hold more that adds up than a prompt does: wider codes, more rows; smaller batches keep the time."""
    if documents < MANY:
        return schedule
    batch = max(16, min(schedule.batch, 65_536 // documents))
    return dataclasses.replace(schedule, code=128, slots=64, directions=96, batch=batch)


def releases_for(releases: Sequence[str], documents: int) -> tuple[str, ...]:
    """Without the answers for each document where a sum can be had."""
    many = documents >= MANY and "sum" in releases
    return tuple(r for r in releases if not (many and r == "response"))
