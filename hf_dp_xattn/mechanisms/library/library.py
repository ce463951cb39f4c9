r"""`library`: each private text is answered by a text of a public library, near ones more often than far ones.

*Formal guarantee.* Public: the library (texts, their codes, the encoder), for each epsilon a plan (which entries may answer at which
place, how many count as near, their odds), and the number m of units. Private: units u_1, ..., u_m (phrases, rules, documents, or the parts
of one whole context), each encoded by itself: its code is a function of that unit alone, and so is its exact order of the entries
(`entry_lattice.py`); which entries those are, and how many, depends on m and on the unit's place alone (`places.py`). **Released:**
R(u_1), ..., R(u_m): for each unit the text of one entry, drawn by rank with fresh coins (`privacy/rank_response.py`, one profile for each
place: `privacy/joint_response.py`). **Neighbouring relation:** replace_one. **Theorem:** R is epsilon-DP for replacing its unit; the units
are disjoint, so by parallel composition the whole list is epsilon-DP for replacing one of them, delta = 0. For unit="context" in m parts
either each answer is drawn at epsilon / m and basic composition gives epsilon for replacing all parts at once, or all parts are answered
together, by one draw among the combinations of their entries that is itself epsilon-DP for the context (`ProductResponse`); both among
contexts of as many parts: m is public. Everything that is done with the texts is post-processing. A text that the library does not hold
cannot be released.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError, ContextError
from ...privacy.joint_response import PlacedResponse, ProductResponse
from ...privacy.rank_response import RankResponse
from ..base import GuaranteeNumbers, Integers, LayerSpec, Mechanism, NoisePart, State
from ..inputs import check_context, check_groups, rows_of
from .entry_lattice import EntryLattice
from .places import Places

NO_LIBRARY = (
    "mechanism='library' needs a library of PUBLIC texts: pass calibration=dpx.calibrate(host) (made of the public prompts that come "
    "with the package, in minutes), dpx.calibrate(host, public_texts), or the folder or Hub id of one that is shared. On the command line: "
    "hf-dp-xattn calibrate MODEL --out FOLDER. Nothing was spent."
)


_FAR = 1e4  # of a canary's code: what is clamped anyway


@dataclass(frozen=True, eq=False)
class Shelf:
    """K entries that may answer a unit, and how: their texts and codes, and the profile by rank."""

    texts: tuple[str, ...]
    lattice: EntryLattice
    response: RankResponse

    def __post_init__(self) -> None:
        if not len(self.texts) == self.lattice.size == self.response.size:
            raise ConfigError(f"A shelf for {self.response.size} entries must hold as many.")


class FromLibrary(Mechanism[torch.Tensor]):
    """A release of entries. shelves: what may leave. answers: into how many parts a unit is cut. Private are codes [m, C] of units."""

    config: DPXAttnConfig
    shelves: tuple[Shelf, ...]
    answers: int
    counted: bool = False  # texts with multiplicities, in no order of the units; else one text for each unit

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

    def canaries(self, count: int, rows: int, generator: torch.Generator) -> list[torch.Tensor]:
        """Codes of one unit, far out in random directions of the public box."""
        center = self.shelves[0].lattice.map.center
        directions = torch.randn(count, self.answers, len(center), generator=generator, dtype=torch.float64)
        return [(center + d.sign() * _FAR).float() for d in directions]

    def bystander(self) -> torch.Tensor:
        return self.shelves[0].lattice.map.center.float().unsqueeze(0)


def _numbers(shelves: Sequence[Shelf], split: str) -> GuaranteeNumbers:
    """What a guarantee says of answers from these shelves."""
    sizes = sorted({shelf.response.size for shelf in shelves})
    likely = sorted({round(shelf.response.probability(1), 4) for shelf in shelves})
    listed = [f"{least:g}" if least == most else f"{least:g} to {most:g}" for least, most in
              ((sizes[0], sizes[-1]), (likely[0], likely[-1]))]  # fmt: skip
    return GuaranteeNumbers(
        1.0,
        1.0,
        0.0,
        f"each text is answered by one of {listed[0]} public texts: near ones most often (the nearest one with probability {listed[1]}), "
        f"or any other one{split} (pure epsilon; delta is not used)",
    )


@dataclass(frozen=True, eq=False)
class PreparedLibrary(FromLibrary):
    """A `library` release of which everything public is fixed.

    shelves: by the place of a unit in its context (`places`); or one for all; or one for each part of a joint answer. answers: 1, or into
    how many parts a context is cut that is one unit. joint: these parts are answered together; None: each by itself. Private are codes
    [m, C], one for each unit (for each part of a context), each computed of that unit alone.
    """

    config: DPXAttnConfig
    shelves: tuple[Shelf, ...]
    places: Places = field(default_factory=Places)
    answers: int = 1
    joint: ProductResponse | None = None

    def __post_init__(self) -> None:
        if self.joint is None and len(self.shelves) not in (1, self.places.size):
            raise ConfigError(f"A library has one shelf or {self.places.size}, got {len(self.shelves)}.")
        if self.joint is not None:
            sizes = tuple(shelf.lattice.size for shelf in self.shelves)
            if self.config.unit != "context" or sizes != self.joint.sizes or len(sizes) != self.answers:
                raise ConfigError(
                    f"A joint answer over lists of {self.joint.sizes} needs such shelves, and unit='context'."
                )

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        if self.joint is not None:
            return (NoisePart(self.joint, (self.joint.event,)),)
        placed = PlacedResponse(tuple(shelf.response for shelf in self.shelves))
        return (NoisePart(placed, (placed.event,) * self.answers),)

    @property
    def numbers(self) -> GuaranteeNumbers:
        if self.joint is not None:
            lists = " x ".join(str(size) for size in self.joint.sizes)
            return GuaranteeNumbers(
                1.0,
                1.0,
                0.0,
                f"all {self.answers} parts are answered together by one of {lists} combinations of public texts: the nearest ones with "
                f"probability {self.joint.truth:.4g}, or any combination (pure epsilon; delta is not used)",
            )
        each = float(self.shelves[0].response.epsilon)
        return _numbers(
            self.shelves, f", {self.answers} answers of {each:g} each" if self.answers > 1 else ""
        )

    @property
    def likely(self) -> float:
        """P(the nearest entry is the answer), of the shelf where it is least likely; of a joint answer that all nearest ones are."""
        if self.joint is not None:
            return self.joint.odds / self.joint.total
        return min(shelf.response.probability(1) for shelf in self.shelves)

    def _shelves_of(self, count: int) -> list[int]:
        """Which shelf answers each of `count` units. Public."""
        if self.joint is not None:
            return list(range(count))
        return [0] * count if len(self.shelves) == 1 else self.places.shelves(count)

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """[m, 1 + t]: each unit's place, which is public, and the entries of its shelf that are nearest to it; of a joint answer [m, 1]:
        the nearest one. A function of each unit and of its public place alone."""
        rows = rows_of(private)
        places = torch.tensor(self._shelves_of(len(rows)), dtype=torch.int64)
        most = 1 if self.joint is not None else max(shelf.response.near for shelf in self.shelves)
        near = torch.zeros(len(rows), most, dtype=torch.int64)
        for place in places.unique().tolist():
            shelf = self.shelves[place]
            count = 1 if self.joint is not None else shelf.response.near
            near[places == place, :count] = shelf.lattice.nearest(rows[places == place], count)
        return (near if self.joint is not None else torch.cat([places[:, None], near], dim=1),)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        """The entries' texts."""
        answers = noised[0].tolist()
        return tuple(
            self.shelves[s].texts[a] for s, a in zip(self._shelves_of(len(answers)), answers, strict=True)
        )

    def growing(self, units: int | None) -> PreparedLibrary:
        """By one shelf, as how many units will come is not known."""
        if self.config.unit != "group":
            raise ConfigError(
                "A library's release grows by units: use unit='group', or leave out the horizon."
            )
        shelf = self.shelves[self.places.shelf(2, 2**30) if len(self.shelves) > 1 else 0]
        return dataclasses.replace(self, shelves=(shelf,))

    def at(self, config: DPXAttnConfig) -> PreparedLibrary:
        """The same lists and near sizes at another epsilon."""
        if self.joint is not None:
            joint = ProductResponse.of(config.epsilon, self.joint.sizes, self.joint.wrong)
            return dataclasses.replace(self, config=config, joint=joint)
        share = Fraction(config.epsilon) / self.answers
        shelves = tuple(
            dataclasses.replace(s, response=RankResponse.of(share, s.response.size, max(1, s.response.near)))
            for s in self.shelves
        )
        return dataclasses.replace(self, config=config, shelves=shelves)


def prepare(config: DPXAttnConfig, specs: Sequence[LayerSpec], calibration: Any) -> PreparedLibrary:
    """The library holds the texts and plans; no layer takes part. Raises ConfigError where there is none."""
    if calibration is None:
        raise ConfigError(NO_LIBRARY)
    prepared: PreparedLibrary = calibration.prepare(config)
    return prepared
