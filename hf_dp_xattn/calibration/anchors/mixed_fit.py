r"""Release "mixed": the public move of the anchors, and the choice between it and the histogram alone, from public contexts.

*Choice.* Held-out public contexts are like the public ones, where a histogram does best; a private one may be unlike them. So both are also
judged on **unlike** contexts: the codebook loses every eighth cluster of cells, and half of the rows of each unlike context come from one
of the lost clusters. "mixed" is chosen at an epsilon where it costs like contexts at most `LIKE_COST` (FVU, ratio) and lowers the product
of both FVUs: what a like context may lose in ratio, an unlike one must gain. Public data decides alone, and the plan's predicted quality
stays that of like contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.cells import CellDecoder
from ...mechanisms.anchors.move import RowMove
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from ...mechanisms.anchors.quantizer import RowQuantizer
from .cells_fit import Codebook
from .judge import Judged, Jury, judge
from .kmeans import assign, kmeans
from .objective import Objective
from .slots_fit import PublicContexts

LIKE_COST = 1.05
UNCLIPPED = 0.9  # of the public rows keep their code's length
_CONTEXTS = 512
_ROWS = 2**18
_UNLIKE = 48
_TOPICS = 8  # every eighth cluster of cells is lost
_CLUSTERS = 64
_RIDGE = 1e-3


@torch.no_grad()
def fit_move(book: Codebook, plan: AnchorPlan, units: torch.Tensor) -> RowMove:
    """The least-squares move from public contexts [N, n, C]; plan: a plan on the book's cells.

    Rows within a cell give the directions (there are many of them), contexts the size of what the cells leave out.
    """
    n = units.shape[1]
    units = units[: max(8, min(_CONTEXTS, _ROWS // n))].float()
    flat = units.flatten(0, 1)
    points = (flat - plan.center) @ plan.matrix.mT + plan.bias
    scale = 1.0 / torch.quantile(points.norm(dim=-1)[: 2**20], UNCLIPPED).clamp_min(1e-9)
    cells = assign(points, plan.codes[0])[0]
    encoder = plan.encoder(float(scale))
    z = encoder.features(flat).float()
    size = torch.bincount(cells, minlength=plan.codes.shape[1]).float()
    codes = torch.zeros(len(size), z.shape[1]).index_add_(0, cells, z) / size.clamp_min(1).unsqueeze(1)
    anchors = book.decoder.anchors.mean(1)
    # a cell without rows here: the code of its anchor
    codes = torch.where(size.unsqueeze(1) > 0, codes, encoder.features(anchors).float())
    left, wanted = (z - codes[cells]).double(), (flat - anchors[cells]).double()
    within, cross = left.mT @ left / len(left), wanted.mT @ left / len(left)
    means = left.unflatten(0, units.shape[:2]).mean(1)
    # rows of a context vary together, so that its mean varies by more than within / n
    ratio = means.square().sum(-1).mean() / within.trace().clamp_min(1e-30)
    moment = within + _RIDGE * within.trace() / len(within) * torch.eye(len(within), dtype=torch.float64)
    return RowMove(scale, codes, (ratio * cross).float(), (ratio * moment).float())


def mixed_plan(plan: AnchorPlan) -> AnchorPlan:
    """The histogram plan's cells with a sum beside them."""
    return dataclasses.replace(plan, release="mixed", tilt=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Unlike contexts, and the codebook without the clusters that half of their rows come from."""

    book: Codebook
    plan: AnchorPlan
    move: RowMove
    contexts: PublicContexts

    def fvu(self, plan: AnchorPlan, config: DPXAttnConfig, objective: Objective) -> float:
        """Of this plan, on the cells that are left."""
        trial_plan = dataclasses.replace(plan, codes=self.plan.codes)
        decoders = Decoders(None, self.book.decoder, self.move)
        return judge(trial_plan, config, decoders, self.contexts, objective)


def fit_trial(
    book: Codebook, plan: AnchorPlan, training: PublicContexts, validation: PublicContexts, seed: int
) -> Trial:
    """Deals the cells into clusters, takes every eighth one away, and composes contexts that need it."""
    generator = torch.Generator().manual_seed(seed)
    codes = plan.codes[0]
    clusters = max(2 * _TOPICS, min(_CLUSTERS, len(codes) // 4))
    topic = assign(codes, kmeans(codes, clusters, seed=seed, per_cell=1))[0]
    kept = topic % _TOPICS > 0
    quantizer = RowQuantizer.from_tensors(plan.center, plan.matrix.mT, codes - plan.bias, reach=plan.reach)

    def topics(units: torch.Tensor) -> torch.Tensor:
        return topic[quantizer.cells(units.flatten(0, 1).float())].view(units.shape[:2])

    contexts = validation.part(torch.arange(min(_UNLIKE, len(validation))))
    units, whole = contexts.units.clone(), contexts.whole.clone()
    first = whole.shape[1] - units.shape[1]  # exact public rows stand before the private ones
    topic_of, pool = topics(units).flatten(), units.flatten(0, 1).clone()
    lost = [t for t in range(0, clusters, _TOPICS) if bool((topic_of == t).any())]
    n, half = units.shape[1], units.shape[1] // 2
    for i in range(len(units) if lost else 0):
        t = lost[int(torch.randint(len(lost), (1,), generator=generator))]
        rows = (topic_of == t).nonzero().squeeze(1)
        place = torch.randperm(n, generator=generator)[:half]
        units[i, place] = pool[rows[torch.randint(len(rows), (half,), generator=generator)]]
        whole[i, first:] = units[i]
    seen = training.units[: max(8, min(_CONTEXTS, _ROWS // n))]
    rest = _without(book, kept)
    trial_plan = dataclasses.replace(plan, codes=codes[kept].unsqueeze(0))
    return Trial(
        rest, trial_plan, fit_move(rest, trial_plan, seen), PublicContexts(units, contexts.mask, whole)
    )


def _without(book: Codebook, kept: torch.Tensor) -> Codebook:
    """The codebook of the cells `kept` [m] bool."""
    decoder = dataclasses.replace(
        book.decoder,
        **{n: getattr(book.decoder, n)[kept] for n in CellDecoder.TENSORS if n != "support"},
    )
    return dataclasses.replace(
        book,
        codes=book.codes[kept],
        decoder=decoder,
        counts=book.counts[:, kept],
        members=book.members[kept],
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """FVU of "mixed" and of the histogram alone at one epsilon, on like and on unlike contexts."""

    epsilon: float
    like: float
    unlike: float
    histogram_like: float
    histogram_unlike: float

    @property
    def mixed(self) -> bool:
        """Whether "mixed" is the better one (the module's rule)."""
        cheap = self.like <= LIKE_COST * self.histogram_like
        return cheap and self.like * self.unlike < self.histogram_like * self.histogram_unlike


def compare(
    best: AnchorPlan,
    mixed: AnchorPlan,
    trial: Trial,
    config: DPXAttnConfig,
    objective: Objective,
) -> Compared:
    """Both plans, judged on like contexts before, on the trial's unlike ones."""
    unlike = [trial.fvu(p, config, objective) for p in (mixed, dataclasses.replace(best, tilt=None))]
    return Compared(best.epsilon, mixed.quality.fvu, unlike[0], best.quality.fvu, unlike[1])


def with_mixed(
    jury: Jury,
    book: Codebook,
    plain: Sequence[AnchorPlan],
    best: Sequence[Judged],
    *,
    seed: int,
) -> tuple[list[Judged], RowMove, list[Compared]]:
    """The best plans, with "mixed" in place of a histogram where the rule says so, and of another release where its FVU is lower.

    plain: the histogram's plans without tilt, for the same epsilons as `best`.
    """
    config, objective, training = jury.config, jury.objective, jury.held.training
    move = fit_move(book, plain[0], training.units)
    trial = fit_trial(book, plain[0], training, jury.held.validation, seed)
    chosen, compared = [], []
    for histogram, leader in zip(plain, best, strict=True):
        mixed = jury.judge(mixed_plan(histogram), Decoders(None, book.decoder, move))
        if leader.plan.release == "histogram":
            compared.append(compare(leader.plan, mixed.plan, trial, config, objective))
            better = compared[-1].mixed
        else:
            better = mixed.plan.quality.fvu < leader.plan.quality.fvu
        chosen.append(mixed if better else leader)
    return chosen, move, compared


def means_or_members(
    config: DPXAttnConfig,
    book: Codebook,
    plan: AnchorPlan,
    validation: PublicContexts,
    objective: Objective,
) -> Codebook:
    """For long contexts: attention over public rows, reweighted to the noised counts, where that beats the cells' means."""
    members = dataclasses.replace(book.decoder, anchors=book.members)
    trials = [
        (judge(plan, config, Decoders(None, decoder), validation, objective), i)
        for i, decoder in enumerate((book.decoder, members))
    ]
    return book if min(trials)[1] == 0 else dataclasses.replace(book, decoder=members)
