"""A corpus as ONE context, read as a stream: each document is a unit, in memory one batch after the other, over any number of processes.

*Formal guarantee.* Released is what `Mechanism.run` releases of all documents of all processes as one context: exact sums of the units'
contributions are integers, so that their order, batches and shards do not show, bit for bit. The neighbouring relation is that of the
config, over the documents of all processes together. Each document is charged under its own name, all in one write of ONE ledger (the
first process's), before noise is drawn: exact sums exist in memory before the charge, and nothing of them leaves before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import ConfigError, ContextError
from ..mechanisms.base import Integers, Mechanism, Released
from ..privacy.bits import SystemEntropy
from ..privacy.ledger import Name, Namer
from ..ranks import Ranks, largest, require_room
from .base_guard import BaseGuard
from .context import Part, PrivateContext
from .packed_names import Digests, PackedNames
from .released_cache import Key
from .reporting import Spent

BATCH = 64
MANY = 2**40  # units, where nobody knows how many there are
UNSPENT = "Nothing was spent."
TWICE = (
    "The same document stands in the shards of two processes. Did each one pass the whole dataset? Give each its own part: "
    "datasets.distributed.split_dataset_by_node(dataset, rank, world_size). Nothing was spent."
)


class Document(NamedTuple):
    """One document. context: it alone. parts: the names that it is charged under."""

    context: PrivateContext
    parts: tuple[Part, ...]


def is_corpus(context: Any) -> bool:
    """Whether it is read as a stream of documents: a dataset of `datasets`, or an iterator."""
    if isinstance(context, Mapping):  # such as a DatasetDict
        return False
    return isinstance(context, Iterator) or (
        type(context).__module__.split(".")[0] == "datasets" and hasattr(context, "__iter__")
    )


@dataclass
class Shard:
    """What this process read. names: by document. encoder: what encodes them. variants: in which way, of all of them in any order. exact:
    sums, none before the first document. PRIVATE."""

    names: PackedNames
    encoder: tuple[Any, ...] = ()
    variants: int = 0
    rows: int = 0
    exact: Integers = ()

    def name(self, document: Document, namer: Namer) -> None:
        """One more document's names."""
        names = _names(namer, document)
        self.names.add(names)
        self.encoder = document.context.encoder
        if document.context.variant:
            own = namer.digest([b"variant", names[0].digest.encode(), document.context.variant])
            self.variants = (self.variants + int(own.rpartition("-")[2], 16)) % 2**256

    def add(self, exact: Integers) -> None:
        """Raises ReleaseError where the sum may not fit."""
        if self.exact:
            for one, two in zip(self.exact, exact, strict=True):
                require_room(largest(one) + largest(two))
            exact = tuple(one + two for one, two in zip(self.exact, exact, strict=True))
        self.exact = exact


@torch.inference_mode(False)  # what is kept must serve other modes too
@torch.no_grad()
def release_corpus(
    guard: BaseGuard[Any, Any, Any],
    documents: Iterable[Any],
    read: Callable[[Any], Document],
    *,
    fresh: bool = False,
) -> Any:
    """One release of this process's documents and those of all others in its job; each of them calls it, and holds the release then.

    Args:
        guard: of the protected host; in each process of the same host, config and calibration.
        documents: of this process; may be none. What can be read twice is: first for its names, so that a refusal comes early.
        read: validates and names one.
        fresh: release again; charged again.

    Raises:
        ContextError, ConfigError: not valid, or a document that stands in two processes' shards; nothing was spent.
        BudgetExceededError: the ledger refuses; nothing was spent.
        ReleaseError: a process is gone; it says what was spent.
    """
    ranks, releases = Ranks.current(), guard.releases
    if guard.config.unit != "group":
        raise ConfigError(
            "A corpus is released with unit='group': each document is a unit. Nothing was spent."
        )
    with ranks.alive(UNSPENT):
        namer = ranks.share(releases.ledger.namer() if ranks.first else None)
        state = ranks.agreed(guard.current)
        general = ranks.agreed(lambda: guard.prepare(state))
        ranks.agreed(guard.check_codes)
        names: Shard | None = None
        units = MANY
        if not isinstance(documents, Iterator):
            names = ranks.agreed(lambda: _named(namer, _told(documents, ranks, "naming documents"), read))
            units = sum(ranks.everyone(names.names.documents))
        recipe = ranks.agreed(lambda: guard.prepared_for(general, _stands_for(units, 0)))
        _check_recipe(ranks, recipe)
        if names is not None:
            whole = _gathered(ranks, releases, names.names)
            key = _key(ranks, releases, whole, names)
            known = None if fresh else _known(ranks, guard, key, state)
            if known is not None:
                return known
            _check_budget(ranks, releases, whole, recipe)
        shard = ranks.agreed(
            lambda: _read(recipe, namer, _told(documents, ranks, "reading documents"), read, names)
        )
        counts = ranks.everyone((shard.names.documents, shard.rows))
        total, rows = sum(n for n, _ in counts), sum(r for _, r in counts)
        ranks.agreed(lambda: _check_count(guard, general, recipe, total))
        if names is None:
            whole = _gathered(ranks, releases, shard.names)
            key = _key(ranks, releases, whole, shard)
            known = None if fresh else _known(ranks, guard, key, state)
            if known is not None:
                return known
        exact = ranks.total(shard.exact)
    mechanism: Mechanism[Any] = recipe.prepared
    entropy = SystemEntropy() if releases.entropy is None else releases.entropy

    def keep(outcome: Released) -> Any:
        released = guard.of_corpus(recipe, outcome, _stands_for(total, rows), state)
        releases.spent.append(Spent(Digests(whole.charged) if whole else [], released.guarantee))
        releases.cache.put(key, released)
        return released

    def make() -> tuple[Any, Released | None, Integers]:
        """On the first process, before others are heard of: the charge, the noise, and what it keeps."""
        if whole is None:
            return None, None, ()
        # notes are public, and under add_or_remove_one the number of documents is not
        note = {"documents": total} if guard.config.neighboring == "replace_one" else {}
        releases.ledger.charge_corpus(whole.charged, recipe.events, releases.budget, note=note)
        noised = mechanism.noise(exact, entropy)
        outcome = mechanism.published(noised, rows, total, entropy.private)
        return keep(outcome), outcome if outcome.texts else None, noised

    with ranks.alive(
        "The release may have been charged: the first process's ledger tells. If it was, that process keeps it: release the same corpus "
        "again there, which costs nothing."
    ):
        kept, text, noised = ranks.agreed(make)
        # texts are read once; rows and structures by each process, of the same noised integers
        text, noised, private_noise = ranks.share(
            (text, () if text else noised, entropy.private) if whole else None
        )
    return kept if ranks.first else keep(text or mechanism.published(noised, rows, total, private_noise))


def _told(documents: Iterable[Any], ranks: Ranks, doing: str) -> Iterator[Any]:
    """With a bar on a terminal."""
    total = len(documents) if isinstance(documents, Sized) else None
    yield from tqdm(
        documents, desc=doing, total=total, unit="doc", disable=None if ranks.first else True, delay=2
    )


def _names(namer: Namer, document: Document) -> list[Name]:
    return [
        Name(namer.digest(p.name), None if p.units is None else namer.grouping(p.units), p.former)
        for p in document.parts
    ]


def _named(namer: Namer, documents: Iterable[Any], read: Callable[[Any], Document]) -> Shard:
    shard = Shard(PackedNames(namer.id))
    for one in documents:
        document = read(one)
        shard.name(document, namer)
    return shard


def _read(
    recipe: Any,
    namer: Namer,
    documents: Iterable[Any],
    read: Callable[[Any], Document],
    names: Shard | None,
) -> Shard:
    """Names and sums, a batch at a time. names: that the documents had before."""
    shard, batch = Shard(PackedNames(namer.id)), list[PrivateContext]()

    def flush() -> None:
        if batch:
            rows = [context.load()[0] for context in batch]
            groups = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
            private = recipe.private(torch.cat(rows), groups)
            shard.rows += recipe.prepared.count(private, groups)
            shard.add(recipe.prepared.exact(private, groups))
            batch.clear()

    for one in documents:
        document = read(one)
        shard.name(document, namer)
        batch.append(document.context)
        if len(batch) == BATCH:
            flush()
    flush()
    if names is not None and names.names != shard.names:
        raise ContextError(
            "The corpus held other documents when it was read for the second time: it must stay as it is. Nothing was spent."
        )
    return shard


def _stands_for(units: int, rows: int) -> PrivateContext:
    """All that is said of a corpus where it is no longer needed."""

    def load() -> Any:
        raise ContextError("A corpus is read as a stream, and is not kept.")

    return PrivateContext(
        units, rows, (b"corpus",), load, phrases=torch.zeros(0, dtype=torch.int64), padded=False
    )


@dataclass(frozen=True)
class Whole:
    """Of all processes' documents, on the first one. digest: of the corpus, whatever the order. charged: names, each once, as equal
    documents are units of their own, as if of several authors."""

    digest: str
    charged: PackedNames


def _gathered(ranks: Ranks, releases: Any, names: PackedNames) -> Whole | None:
    """None on other processes than the first. Raises ContextError, on all, where two of them have one document."""
    shards = ranks.collect(names)

    def together() -> Whole | None:
        if not ranks.first:
            return None
        every = PackedNames.joined(shards)
        digests = every.document_digests()
        if sum(len(np.unique(shard.document_digests())) for shard in shards) != len(np.unique(digests)):
            raise ContextError(TWICE)
        namer = releases.ledger.namer()
        return Whole(namer.digest([b"corpus", digests.tobytes()]), every.distinct())

    return ranks.agreed(together)


def _key(ranks: Ranks, releases: Any, whole: Whole | None, shard: Shard) -> Key:
    """Under which this process finds the corpus's release again: as its encoder is now."""
    digest = ranks.share(whole.digest if whole else None)
    variants = str(sum(ranks.everyone(shard.variants)) % 2**256).encode()
    return digest, releases.ledger.digest([b"corpus", variants, releases.encoders.states(shard.encoder)[0]])


def _known(ranks: Ranks, guard: Any, key: Key, state: Any) -> Any:
    """The release of this corpus that every process has, and that fits its host as it is; None where one is to be made."""
    cached = guard.releases.cache.find([key])
    if cached is not None and guard.misfit(cached, state) is not None:
        cached = None
    return cached if all(ranks.everyone(cached is not None)) else None


def _check_budget(ranks: Ranks, releases: Any, whole: Whole | None, recipe: Any) -> None:
    """Raises, on all, what the ledger would raise now."""

    def check() -> None:
        if whole is not None:
            releases.ledger.check_corpus(whole.charged, recipe.events, releases.budget)

    ranks.agreed(check)


def _check_recipe(ranks: Ranks, recipe: Any) -> None:
    """Raises ConfigError, on all, where it is no sum, or another one in another process."""

    def summed() -> None:
        if not recipe.prepared.additive:
            raise ConfigError(
                "A corpus is released as a sum over its documents: by votes of a library that was calibrated with long lists, by "
                "kernel_sum, or by anchors (sums or histograms). Here each unit would be answered by itself: pass a list. "
                "Nothing was spent."
            )

    ranks.agreed(summed)
    if len(set(ranks.everyone((repr(recipe.prepared.config.to_dict()), repr(recipe.events))))) > 1:
        raise ConfigError("The processes of this release have different configs. Nothing was spent.")


def _check_count(guard: Any, general: Any, recipe: Any, total: int) -> None:
    if not total:
        raise ContextError("The corpus has no documents. Nothing was spent.")
    if guard.releases.enough is not None:
        guard.releases.enough(total)
    chosen = guard.prepared_for(general, _stands_for(total, 0)).prepared
    if not (chosen.additive and chosen.events == recipe.events):
        raise ConfigError(
            f"A stream of {total} documents is short: pass a list, whose units are answered as is best for so many. "
            "Nothing was spent."
        )
