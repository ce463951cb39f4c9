r"""`library`: each private text is answered by a text of a public library, near ones more often than far ones.

*Formal guarantee.* Public: the library (texts, their codes, the encoder), for each epsilon a plan (which K entries may answer, how many
count as near, their odds), and the number m of units. Private: units u_1, ..., u_m (phrases, rules, documents, or one whole context), each
encoded by itself: its code is a function of that unit alone, and so is its exact order of the entries (`entry_lattice.py`); which entries
those are depends on m and on the unit's place alone (`places.py`). **Released:**
R(u_1), ..., R(u_m): for each unit the text of one entry, drawn by rank with fresh coins (`privacy/rank_response.py`). **Neighbouring
relation:** replace_one. **Theorem:** R is epsilon-DP for replacing its unit; the units are disjoint, so by parallel composition the whole
list is epsilon-DP for replacing one of them, delta = 0. For unit="context" in m parts, each answer is drawn at epsilon / m and basic
composition gives epsilon for replacing all parts at once, among contexts of as many parts: m is public. Everything that is done with the
texts is post-processing. A text that the library does not hold cannot be released.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError, ContextError
from ...privacy.rank_response import RankResponse
from ..base import Answers, GuaranteeNumbers, Integers, Mechanism, NoisePart, State, Summand
from ..inputs import check_context, check_groups, rows_of
from .entry_lattice import EntryLattice
from .places import Places

NO_LIBRARY = (
    "mechanism='library' needs a library of PUBLIC texts. Make one with dpx.calibrate(host, public_contexts, "
    "dpx.DPXAttnConfig(mechanism='library', unit='group')), or load a shared one with dpx.TextLibrary.from_pretrained(...)."
)


@dataclass(frozen=True, eq=False)
class Shelf:
    """K entries that may answer a unit: their texts and codes."""

    texts: tuple[str, ...]
    lattice: EntryLattice


class _Answering:
    """What a release at once and one that grows share."""

    shelves: tuple[Shelf, ...]
    response: RankResponse
    answers: int

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(self.response, (self.response.event,) * self.answers),)

    @property
    def numbers(self) -> GuaranteeNumbers:
        response = self.response
        near = "the nearest one" if response.near == 1 else f"the {response.near} nearest ones most often"
        split = f", {self.answers} answers of {float(response.epsilon):g} each" if self.answers > 1 else ""
        return GuaranteeNumbers(
            1.0,
            1.0,
            0.0,
            f"each text is answered by one of {response.size} public texts: {near} (the first with probability "
            f"{response.probability(1):.4g}), or any other one{split} (pure epsilon; delta is not used)",
        )


@dataclass(frozen=True, eq=False)
class TextAnswers(_Answering, Answers[torch.Tensor]):
    """A release that grows: each new unit is answered when it comes, by one shelf, as how many will come is not known."""

    shelves: tuple[Shelf, ...]
    response: RankResponse
    answers: int = 1

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.shelves[0].lattice.nearest(rows_of(private), self.response.near),)

    def join(self, total: Integers, noised: Integers) -> Integers:
        return (torch.cat([*total, *noised]),)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        return tuple(self.shelves[0].texts[i] for i in noised[0].tolist())


@dataclass(frozen=True, eq=False)
class PreparedLibrary(_Answering, Mechanism[torch.Tensor]):
    """A `library` release of which everything public is fixed.

    shelves: K entries each, by the place of a unit in its context (`places`); or one for all. answers: 1, or into how many parts a
    context is cut that is one unit. Private are codes [m, C], one for each unit (for each part of a context), each computed of that
    unit alone.
    """

    config: DPXAttnConfig
    shelves: tuple[Shelf, ...]
    response: RankResponse
    places: Places = field(default_factory=Places)
    answers: int = 1
    warnings: tuple[str, ...] = ()
    calibrated: bool = True

    def __post_init__(self) -> None:
        if len(self.shelves) not in (1, self.places.size):
            raise ConfigError(f"A library has one shelf or {self.places.size}, got {len(self.shelves)}.")
        if any(
            len(s.texts) != self.response.size or s.lattice.size != self.response.size for s in self.shelves
        ):
            raise ConfigError(f"Each shelf must hold {self.response.size} entries.")

    def _shelves_of(self, count: int) -> list[int]:
        """Which shelf answers each of `count` units. Public."""
        return [0] * count if len(self.shelves) == 1 else self.places.shelves(count)

    def count(self, private: torch.Tensor, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        n = check_context(rows_of(private), self.shelves[0].lattice.map.channels, may_be_empty=empty)
        check_groups(self.config.unit, n, groups)
        if self.config.unit == "context" and n != self.answers:
            raise ContextError(
                f"This release is for a context in {self.answers} part(s), there are {n}; nothing was spent."
            )
        if groups is not None and torch.unique(groups).numel() != n:
            raise ContextError("Each unit has ONE code: `groups` must name each row once; nothing was spent.")
        return n

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """[m, t]: the entries of its shelf nearest to each unit. A function of each unit and of its public place alone."""
        rows = rows_of(private)
        own = torch.tensor(self._shelves_of(len(rows)), dtype=torch.int64)
        near = torch.empty(len(rows), self.response.near, dtype=torch.int64)
        for shelf in own.unique().tolist():
            near[own == shelf] = self.shelves[shelf].lattice.nearest(rows[own == shelf], self.response.near)
        return (near,)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        """The entries' texts."""
        answers = noised[0].tolist()
        return tuple(
            self.shelves[s].texts[a] for s, a in zip(self._shelves_of(len(answers)), answers, strict=True)
        )

    def growing(self, units: int | None) -> Summand | Answers[torch.Tensor]:
        if self.config.unit != "group":
            raise ConfigError(
                "A library's release grows by units: use unit='group', or leave out the horizon."
            )
        middle = self.places.shelf(2, 2**30) if len(self.shelves) > 1 else 0
        return TextAnswers((self.shelves[middle],), self.response)

    def at(self, config: DPXAttnConfig) -> PreparedLibrary:
        """The same entries and near size at another epsilon."""
        epsilon = Fraction(config.epsilon) / self.answers
        response = RankResponse.of(epsilon, self.response.size, max(1, self.response.near))
        return dataclasses.replace(self, config=config, response=response)
