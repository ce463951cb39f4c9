r"""`library`: each private text is answered by a text of a public library, near ones more often than far ones.

*Formal guarantee.* Public: the library (texts, their codes, the encoder), for each epsilon a plan (which K entries may answer, how many
count as near, their odds), and the number m of units. Private: units u_1, ..., u_m (phrases, rules, documents, or one whole context), each
encoded by itself: its code is a function of that unit alone, and so is its exact order of the entries (`entry_lattice.py`). **Released:**
R(u_1), ..., R(u_m): for each unit the text of one entry, drawn by rank with fresh coins (`privacy/rank_response.py`). **Neighbouring
relation:** replace_one. **Theorem:** R is epsilon-DP for replacing its unit; the units are disjoint, so by parallel composition the whole
list is epsilon-DP for replacing one of them, delta = 0. For unit="context" in m parts, each answer is drawn at epsilon / m and basic
composition gives epsilon for replacing all parts at once, among contexts of as many parts: m is public. Everything that is done with the
texts is post-processing. A text that the library does not hold cannot be released.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError, ContextError
from ...privacy.rank_response import RankResponse
from ..base import Answers, GuaranteeNumbers, Integers, Mechanism, NoisePart, State, Summand
from ..inputs import check_context, check_groups, rows_of
from .entry_lattice import EntryLattice

NO_LIBRARY = (
    "mechanism='library' needs a library of PUBLIC texts. Make one with dpx.calibrate(host, public_contexts, "
    "dpx.DPXAttnConfig(mechanism='library', unit='group')), or load a shared one with dpx.TextLibrary.from_pretrained(...)."
)


class _Answering:
    """What a release at once and one that grows share."""

    texts: tuple[str, ...]
    lattice: EntryLattice
    response: RankResponse
    answers: int

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(self.response, (self.response.event,) * self.answers),)

    @property
    def numbers(self) -> GuaranteeNumbers:
        response = self.response
        near = (
            "the nearest one"
            if response.near == 1
            else f"each of the {response.near} nearest ones with odds of its rank"
        )
        split = f", {self.answers} answers of {float(response.epsilon):g} each" if self.answers > 1 else ""
        return GuaranteeNumbers(
            1.0,
            1.0,
            0.0,
            f"each text is answered by one of {response.size} public texts: {near} (the first with probability "
            f"{response.probability(1):.4g}), or any other one{split} (pure epsilon; delta is not used)",
        )

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """[m, t]: the entries nearest to each unit. A function of each unit alone."""
        return (self.lattice.nearest(rows_of(private), self.response.near),)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        """The entries' texts."""
        return tuple(self.texts[i] for i in noised[0].tolist())


@dataclass(frozen=True, eq=False)
class TextAnswers(_Answering, Answers[torch.Tensor]):
    """A release that grows: each new unit is answered when it comes."""

    texts: tuple[str, ...]
    lattice: EntryLattice
    response: RankResponse
    answers: int = 1

    def join(self, total: Integers, noised: Integers) -> Integers:
        return (torch.cat([*total, *noised]),)


@dataclass(frozen=True, eq=False)
class PreparedLibrary(_Answering, Mechanism[torch.Tensor]):
    """A `library` release of which everything public is fixed.

    texts: of the entries that may answer. answers: 1, or into how many parts a context is cut that is one unit.
    Private are codes [m, C], one for each unit (for each part of a context), each computed of that unit alone.
    """

    config: DPXAttnConfig
    texts: tuple[str, ...]
    lattice: EntryLattice
    response: RankResponse
    answers: int = 1
    warnings: tuple[str, ...] = ()
    calibrated: bool = True

    def count(self, private: torch.Tensor, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        n = check_context(rows_of(private), self.lattice.map.channels, may_be_empty=empty)
        check_groups(self.config.unit, n, groups)
        if self.config.unit == "context" and n != self.answers:
            raise ContextError(
                f"This release is for a context in {self.answers} part(s), there are {n}; nothing was spent."
            )
        if groups is not None and torch.unique(groups).numel() != n:
            raise ContextError("Each unit has ONE code: `groups` must name each row once; nothing was spent.")
        return n

    def growing(self, units: int | None) -> Summand | Answers[torch.Tensor]:
        if self.config.unit != "group":
            raise ConfigError(
                "A library's release grows by units: use unit='group', or leave out the horizon."
            )
        return TextAnswers(self.texts, self.lattice, self.response)

    def at(self, config: DPXAttnConfig) -> PreparedLibrary:
        """The same entries and near size at another epsilon."""
        epsilon = Fraction(config.epsilon) / self.answers
        response = RankResponse.of(epsilon, self.response.size, max(1, self.response.near))
        return dataclasses.replace(self, config=config, response=response)
