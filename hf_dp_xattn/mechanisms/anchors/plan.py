"""Plans: what `anchors` releases at one epsilon, and how it is decoded. Everything here is public."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .cells import CellDecoder, Tilt
from .fallback import Fallback, Worth
from .likeness import Likeness
from .move import RowMove
from .row_sum import RowSum
from .slots import SlotDecoder, SlotHead

RELEASES = ("sum", "response", "histogram", "mixed")


@dataclass(frozen=True)
class Quality:
    """Predicted on public contexts that no part of the plan was fitted to: fraction of unexplained variance (FVU), 95 % interval."""

    fvu: float
    low: float
    high: float
    contexts: int


NOT_JUDGED = Quality(math.inf, math.inf, math.inf, 0)


@dataclass(frozen=True, eq=False)
class AnchorPlan:
    """One epsilon's release and decoder.

    release: "sum" (B: learned sum, discrete Gaussian), "response" (k-ary randomised response of each unit's cell), "histogram"
        (A, C: geometric noise on the cells' counts) or "mixed" (counts, and a sum of the codebook's own codes beside them).
    center, reach [C], matrix [K, C], bias [K]: the public map from units to codes; coordinates further than `reach` from the centre are
        clamped. codes [S, m, K]: the cells ("histogram", "mixed": S = 1; "response": S codebooks, each of what the one before left
        over), empty for "sum".
    bound: l1 bound of one unit's counts ("histogram" of larger units). share_plus: part of epsilon that keeps empty cells empty (A;
        1/2 is C).
    noise: standard deviation of the noise that the decoder was trained for ("sum"), or probability of a true answer ("response").
    head: the slot decoder's own part; None where cells are decoded to anchors. worth: the plan beside no release; None: never compared.
    likeness: what tells releases unlike public ones, which give the fall-back; None: all are decoded.
    """

    epsilon: float
    release: str
    center: torch.Tensor
    reach: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor
    codes: torch.Tensor
    bound: float
    share_plus: float
    noise: float
    head: SlotHead | None
    tilt: Tilt | None
    quality: Quality
    worth: Worth | None = None
    likeness: Likeness | None = None

    def encoder(self, scale: float = 1.0) -> RowSum:
        """The public map with another scale, as the map of a sum."""
        return RowSum.from_tensors(self.center, self.matrix * scale, self.bias * scale, reach=self.reach)

    TENSORS = ("center", "reach", "matrix", "bias", "codes")
    FIELDS = ("epsilon", "release", "bound", "share_plus", "noise")

    @property
    def tried_on_unseen(self) -> bool:
        """Whether its quality counts contexts of kinds that nothing was fitted to."""
        return self.worth is not None and self.worth.unseen_kinds


@dataclass(frozen=True, eq=False)
class Decoders:
    """What the plans share: the slot decoder, for cells the anchors' rows and priors, for "mixed" how a mean code moves them,
    and what stands where a release says nothing."""

    slots: SlotDecoder | None = None
    cells: CellDecoder | None = None
    move: RowMove | None = None
    fallback: Fallback | None = None
