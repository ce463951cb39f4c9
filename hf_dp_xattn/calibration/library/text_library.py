"""`TextLibrary`: public texts, their codes, and for each epsilon what may answer. safetensors + JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from ...artefacts.card import table
from ...artefacts.codec import Tensors
from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.quantizer import ExactAffine
from ...mechanisms.library.entry_lattice import EntryLattice
from ...mechanisms.library.library import FromLibrary, PreparedLibrary, Shelf
from ...mechanisms.library.places import Places
from ...mechanisms.library.votes import PreparedVotes, Reading
from ...privacy.joint_response import ProductResponse
from ...privacy.rank_response import RankResponse
from ...privacy.response import MAX_ALPHABET
from ..calibration_card import Described
from ..stored import CHECKS, Stored
from .stored_plan import LibraryPlan, read_plan, verify_plan
from .vote_plan import VotePlan, chosen

Encode = Callable[[Sequence[str]], torch.Tensor]

GROUPINGS = {
    "group": ("phrases", "sentences", "segments", "lines", "documents"),
    "context": ("context", "phrases", "sentences", "segments", "lines"),
}
PROBES = 8  # entries whose codes tell another encoder
_SAME = 0.99  # cosine of a probe's codes: batching and precision leave far more, another encoder far less
_FIELDS = ("unit", "grouping", "encoder", "contexts", "units", "lengths", "reach", "settings")


@dataclass(frozen=True, eq=False, repr=False)
class TextLibrary(Stored):
    """Everything that `library` reads besides the private codes. Nothing in here may depend on a private context.

    Args:
        unit: what it was made for.
        grouping: how contexts are cut in units.
        encoder: the name of what made the codes.
        contexts: how many public contexts.
        units: the largest number of units in one.
        lengths: of `Places`.
        reach: public range of a coordinate of a code.
        settings: how it was made, for the card.
        texts: N public texts.
        codes: [N, p] int8, as `lattice_codes` makes them.
        center: [C] of the encoder's codes.
        projection: [C, p], from the encoder's codes to the library's.
        probe: [r, C], codes of the first r texts.
        plans: what may answer at each epsilon.
        votes: how lists of many units are released, for each epsilon and size; none where the public contexts are too few.

    Raises:
        ConfigError: from `from_pretrained` and `check_encoder`, see there.

    Example:
        >>> public = [["a red circle", "pink background"], ["a blue star", "black background"], ["a red star", "pink background"]]
        >>> config = dpx.DPXAttnConfig(mechanism="library", epsilon=8.0, unit="group")
        >>> library = dpx.calibrate(pipe, public, config, epsilons=8.0, progress=False)
        >>> "a blue star" in library.texts
        True
        >>> library.save_pretrained("library").name
        'library'
        >>> dpx.TextLibrary.from_pretrained("library").texts == library.texts
        True
    """

    KEYS = frozenset({"kind", "plans", "votes", *_FIELDS})
    KIND = mechanism = "library"
    neighboring = "replace_one"

    unit: str
    grouping: str
    encoder: str
    contexts: int
    units: int
    lengths: tuple[int, ...]
    reach: float
    settings: dict[str, Any]
    texts: tuple[str, ...]
    codes: torch.Tensor
    center: torch.Tensor
    projection: torch.Tensor
    probe: torch.Tensor
    plans: tuple[LibraryPlan, ...]
    votes: tuple[VotePlan, ...] = ()

    @property
    def channels(self) -> int:
        """Length of the encoder's codes."""
        return self.projection.shape[0]

    @property
    def places(self) -> Places:
        """Which shelf answers which unit."""
        return Places(self.lengths)

    def check(self, config: DPXAttnConfig) -> None:
        """Whether the library can give a config's guarantee.

        Args:
            config: of a release.

        Raises:
            ConfigError: the library was made for another mechanism or unit.
        """
        if config.mechanism != self.KIND:
            raise ConfigError(
                f"This library is for mechanism='library', the config says {config.mechanism!r}. Calibrate for that."
            )
        self.check_settings(config, {"unit": self.unit})
        if config.neighboring != self.neighboring and not self.votes:
            raise ConfigError(
                f"This library answers each unit by itself, so how many there are is public; neighboring={config.neighboring!r} needs "
                "votes, for which it has too few public contexts. Use neighboring='replace_one', or calibrate with 400 units or more."
            )

    def check_encoder(self, encode: Encode) -> None:
        """Refuses another encoder than the one that made the codes, by the codes of a few public entries.

        Args:
            encode: n strings -> float codes [n, C].

        Raises:
            ConfigError: other codes, or codes of another shape.
        """
        codes = encode(list(self.texts[: len(self.probe)]))
        if codes.shape != self.probe.shape:
            raise ConfigError(
                f"The library's codes were made by {self.encoder or 'another encoder'} and have {self.channels} numbers, this one gives "
                f"{list(codes.shape[1:])}. Use that one, or calibrate again."
            )
        same = torch.nn.functional.cosine_similarity(
            codes.detach().cpu().float() - self.center, self.probe - self.center
        )
        if not bool((same >= _SAME).all()):
            raise ConfigError(
                f"This encoder gives other codes than the one that the library was made with ({self.encoder or 'unnamed'}): cosine "
                f"{float(same.min()):.3f} on a public text. Use that one, or calibrate again."
            )

    def plan_for(self, epsilon: float) -> LibraryPlan:
        """The plan made for the epsilon nearest to this one (in ratio). Any plan is private at any epsilon.

        Args:
            epsilon: of a release.
        """
        return min(self.plans, key=lambda p: max(p.epsilon / epsilon, epsilon / p.epsilon))

    def votes_for(self, config: DPXAttnConfig, units: int | None) -> VotePlan | None:
        """The plan by which a list votes; None where its units are answered one by one, as they are where it is shorter than any list that
        was tried: votes lose the order, which matters to a short text.

        Args:
            config: of a release.
            units: how many the list has, where that is public; under add_or_remove_one the largest public context stands for it.
        """
        if self.unit != "group" or not self.votes:
            return None
        if config.neighboring != self.neighboring:
            return chosen(self.votes, config.epsilon, self.units)
        plan = chosen(self.votes, config.epsilon, units or 0)
        return plan if plan.units <= (units or 0) and plan.better else None

    def prepare_list(self, config: DPXAttnConfig, units: int | None) -> FromLibrary:
        """What a release of so many units is made of: votes where held-out lists say so, else answers.

        Args:
            config: mechanism="library", of the library's unit.
            units: as in `votes_for`; of unit="context" as in `prepare`.

        Raises:
            ConfigError: the library cannot give the config's guarantee.
        """
        self.check(config)
        votes = self.votes_for(config, units)
        return self.prepare(config, units) if votes is None else self.voting(votes, config)

    def voting(self, plan: VotePlan, config: DPXAttnConfig) -> PreparedVotes:
        """What votes by one of the plans are made of.

        Args:
            plan: of `votes`.
            config: of a release.
        """
        affine = ExactAffine.from_tensors(self.center, self.projection, reach=self.reach)
        shelf = self._shelf(
            plan.entries, affine, RankResponse((len(plan.entries),), (1,), Fraction(config.epsilon))
        )
        return PreparedVotes.of(
            config, shelf, Reading(shelf.texts, plan.share, plan.dispersion), plan.share_plus
        )

    def prepare(self, config: DPXAttnConfig, units: int | None = None) -> PreparedLibrary:
        """What answers at config.epsilon are made of.

        Args:
            config: mechanism="library", of the library's unit.
            units: for unit="context" where the plan answers part by part: how many parts the context has. Public.

        Raises:
            ConfigError: the library cannot give the config's guarantee.
        """
        self.check(config)
        self.check_settings(config, {"neighboring": self.neighboring})
        plan = self.plan_for(config.epsilon)
        affine = ExactAffine.from_tensors(self.center, self.projection, reach=self.reach)
        if plan.answers and self.unit == "context" and units not in (None, 1):
            raise ConfigError(f"This plan answers a context as a whole, not in {units} parts.")
        parts = plan.answers or units
        if parts is None or parts < 1:
            raise ConfigError(
                "This library answers a context part by part: say how many parts there are, prepare(config, units=...)."
            )
        together = plan.joint_for(parts)
        if together is not None:
            joint = ProductResponse.of(
                config.epsilon, [len(plan.lists[i]) for i in together.lists], together.wrong
            )
            even = [RankResponse((size,), (1,), joint.epsilon) for size in joint.sizes]
            shelves = [
                self._shelf(plan.lists[i], affine, r) for i, r in zip(together.lists, even, strict=True)
            ]
            return PreparedLibrary(config, tuple(shelves), self.places, parts, joint)
        share = Fraction(config.epsilon) / parts
        by_pair = {
            (index, near): self._shelf(
                plan.lists[index], affine, RankResponse.of(share, len(plan.lists[index]), near)
            )
            for index, near in set(plan.shelves)
        }
        return PreparedLibrary(config, tuple(by_pair[s] for s in plan.shelves), self.places, parts)

    def _shelf(self, entries: torch.Tensor, affine: ExactAffine, response: RankResponse) -> Shelf:
        texts = tuple(self.texts[i] for i in entries.tolist())
        return Shelf(texts, EntryLattice(affine, self.codes[entries]), response)

    def header(self) -> dict[str, Any]:
        return {
            "kind": self.KIND,
            **{name: getattr(self, name) for name in _FIELDS},
            "plans": [p.header() for p in self.plans],
            "votes": [p.header() for p in self.votes],
        }

    def tensors(self) -> Tensors:
        written = [text.encode() for text in self.texts]
        return {
            "texts": torch.frombuffer(bytearray(b"".join(written)), dtype=torch.uint8),
            "lengths": torch.tensor([len(w) for w in written], dtype=torch.int64),
            "codes": self.codes,
            "center": self.center,
            "projection": self.projection,
            "probe": self.probe,
            **{f"plan.{i}.entries": p.entries for i, p in enumerate(self.plans)},
            **{f"votes.{i}.entries": p.entries for i, p in enumerate(self.votes)},
            **{f"votes.{i}.share": p.share for i, p in enumerate(self.votes)},
        }

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> TextLibrary:
        blob, texts, at = tensors["texts"].numpy().tobytes(), [], 0
        for length in tensors["lengths"].tolist():
            texts.append(blob[at : at + length].decode())
            at += length
        if at != len(blob) or int(tensors["lengths"].min()) < 1:
            CHECKS.refuse("its texts")
        return cls(
            **{**{n: header[n] for n in _FIELDS}, "lengths": tuple(header["lengths"])},
            texts=tuple(texts),
            codes=tensors["codes"],
            center=tensors["center"],
            projection=tensors["projection"],
            probe=tensors["probe"],
            plans=tuple(read_plan(i, p, tensors[f"plan.{i}.entries"]) for i, p in enumerate(header["plans"])),
            votes=tuple(
                VotePlan.read(i, p, tensors[f"votes.{i}.entries"], tensors[f"votes.{i}.share"])
                for i, p in enumerate(header["votes"])
            ),
        )

    def verify(self) -> None:
        if self.unit not in GROUPINGS or self.grouping not in GROUPINGS[self.unit]:
            CHECKS.refuse(f"unit is {self.unit!r}, grouping {self.grouping!r}")
        for name in ("contexts", "units"):
            CHECKS.integer(getattr(self, name), name)
        CHECKS.name(self.encoder, "encoder")
        CHECKS.number(self.reach, "reach", low=1e-12, high=1e12)
        lengths = [CHECKS.integer(n, "a length") for n in self.lengths]
        if lengths != sorted(set(lengths)) or len(lengths) > 16:
            CHECKS.refuse("its lengths do not rise")
        if not isinstance(self.settings, dict):
            CHECKS.refuse("settings is no object")
        if not 2 <= len(self.texts) <= MAX_ALPHABET or len(set(self.texts)) != len(self.texts):
            CHECKS.refuse("its texts are too few, too many, or one stands twice")
        if not self.plans:
            raise ConfigError("The library holds no plan; calibrate again.")
        sizes = CHECKS.sizes(N=len(self.texts))
        sizes.fit("center", self.center, "C", floats=True)
        sizes.fit("projection", self.projection, "C", "p", floats=True)
        sizes.fit("codes", self.codes, "N", "p")
        sizes.fit("probe", self.probe, min(PROBES, len(self.texts)), "C", floats=True)
        for i, plan in enumerate(self.plans):
            verify_plan(i, plan, len(self.texts), self.unit, (1, self.places.size))
        for i, votes in enumerate(self.votes):
            votes.verify(i, len(self.texts))
            self.voting(votes, self._example(votes.epsilon))
        for config in (self._example(p.epsilon) for p in self.plans):
            self.prepare(config, units=2 if self.plan_for(config.epsilon).answers == 0 else None)

    def _example(self, epsilon: float) -> DPXAttnConfig:
        return DPXAttnConfig(mechanism="library", unit=self.unit, epsilon=epsilon)

    def described(self) -> Described:
        rows = [
            (
                f"{p.epsilon:g}",
                *p.described(),
                f"{p.quality.distortion:.3f} ({p.quality.low:.3f} to {p.quality.high:.3f})",
                f"{p.quality.exact:.3f}",
            )
            for p in self.plans
        ]
        lists = [
            (f"{p.epsilon:g}", p.units, len(p.entries), f"{p.quality.distortion:.3f}", f"{p.answers:.3f}")
            for p in self.votes
        ]
        voted = (
            "\n\nOf lists of so many units, under the best matching; the better way is taken:\n\n"
            + table(("epsilon", "units", "texts voted for", "distortion of votes", "of answers"), lists)
        )
        return Described(
            mechanism=self.mechanism,
            unit=self.unit,
            neighboring=self.neighboring,
            contexts=self.contexts,
            units=self.units,
            layers=0,
            settings={
                "texts": len(self.texts),
                "grouping": self.grouping,
                "encoder": self.encoder,
                **self.settings,
            },
            utility="Predicted on public contexts that were held out (1 - cosine between a unit and its answer; 0: the unit itself, 1: "
            "nothing of it):\n\n"
            + table(("epsilon", "texts that may answer", "near", "distortion", "nearest, no noise"), rows)
            + (voted if lists else ""),
        )
