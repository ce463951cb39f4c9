"""`build_library`: from public contexts and an encoder to a library, without any training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.library.entry_lattice import lattice_codes, unit_codes
from ...mechanisms.library.places import Places
from ...privacy.response import MAX_ALPHABET
from ...ranks import Ranks
from ...records import plain_text
from ..calibration_options import EPSILONS
from ..checkpoints import NOTHING_KEPT, Checkpoints
from ..progress import Progress
from .encoding import ALONE, encode_chunks
from .joint_plans import JointPlanner
from .library_plans import PublicUnits, Shelving, places_for
from .metric import Metric, Responses, fit_metric
from .recombination import recombined
from .stored_plan import LibraryPlan
from .text_library import GROUPINGS, PROBES, Encode, TextLibrary
from .vote_fit import Voting
from .vote_plan import VotePlan

_RECOMBINED = 50_000
_TIMED = 8  # texts that are encoded first, to say how long it will take
_PRODUCTS = 70  # of 1,024 codes with those of all texts: about what the choice for one epsilon takes
_METRIC_TEXTS = 2**14  # texts whose codes fix the metric; those of the others are projected at once


@dataclass(frozen=True)
class LibraryOptions:
    """How a library is made.

    epsilons: a plan for each. grouping: how contexts are cut in units; by default "phrases" for groups. encoder: the encoder's name.
    width: directions of the codes that are kept. flatten: 0: cosine of centred codes; 1: all directions count alike.
    held_out: share of the contexts by which plans are chosen. expand: new texts by `recombined` (True: up to 50,000; or how many at most).
    kept: codes, so that a run that was broken off is taken up again. responses: what the host does with each of n strings, floats
    [n, d]; then texts that it treats alike count as near. alike: how many public texts are tried so.
    """

    epsilons: Sequence[float] = EPSILONS
    grouping: str | None = None
    encoder: str = ""
    width: int = 256
    flatten: float = 0.5
    held_out: float = 0.2
    expand: bool | int = False
    seed: int = 0
    progress: bool = True
    kept: Checkpoints = NOTHING_KEPT
    responses: Responses | None = None
    ranks: Ranks = ALONE
    alike: int = 1500


@torch.no_grad()
def build_library(
    public_units: Sequence[str] | Sequence[Sequence[str]],
    encode: Encode,
    config: DPXAttnConfig,
    options: LibraryOptions | None = None,
) -> TextLibrary:
    """A library of PUBLIC texts; nothing private may be among them.

    Args:
        public_units: contexts, each a list of units (phrases, segments, documents); or texts that are contexts of one unit each.
        encode: n strings -> float codes [n, C], each a function of its string alone.
        config: mechanism="library", and the unit.

    Raises:
        ConfigError: fewer than 2 distinct texts, too many, an empty one, something else than strings, or NaN codes.
    """
    options = LibraryOptions() if options is None else options
    if config.mechanism != "library":
        raise ConfigError(f"A library is for mechanism='library', the config says {config.mechanism!r}.")
    grouping = options.grouping or GROUPINGS[config.unit][0]
    if grouping not in GROUPINGS[config.unit]:
        raise ConfigError(
            f"unit={config.unit!r} has groupings {', '.join(GROUPINGS[config.unit])}, got {grouping!r}."
        )
    contexts = [_units(c) for c in public_units]
    texts = list(dict.fromkeys(text for context in contexts for text in context))
    if not 2 <= len(texts) <= MAX_ALPHABET:
        raise ConfigError(
            f"A library has 2 to {MAX_ALPHABET} distinct public texts, these contexts have {len(texts)}."
        )
    recombined = _expanded(texts, options)
    texts = [*texts, *recombined]
    with Progress(options.progress, "library") as bar:
        metric, codes, probe = _encode(texts, encode, options, bar)
        center, projection, reach = metric
        whole = grouping == "context"
        places = Places() if whole else places_for([len(c) for c in contexts])
        shelving = Shelving(codes, places, options.seed, apart=not whole)
        units = _public_units(texts, contexts, recombined, places)
        together = max(map(len, contexts)) if config.unit == "context" and not whole else 0
        plans, votes = _plans(texts, recombined, shelving, units, config.unit, together, options, bar)
    return TextLibrary(
        unit=config.unit,
        grouping=grouping,
        encoder=options.encoder,
        contexts=len(contexts),
        units=max(map(len, contexts)),
        lengths=places.lengths,
        reach=reach,
        settings={
            "width": projection.shape[1],
            "metric": "the host's responses"
            if options.responses
            else f"directions flattened by {options.flatten:g}",
            "seed": options.seed,
            "recombined": len(recombined),
        },
        texts=tuple(texts),
        codes=lattice_codes(codes),
        center=center,
        projection=projection,
        probe=probe,
        plans=plans,
        votes=votes,
    )


def _units(context: str | Sequence[str]) -> list[str]:
    units = [context] if isinstance(context, str) else list(context)
    if not units or not all(isinstance(u, str) and plain_text(u).strip() for u in units):
        raise ConfigError(
            "Public contexts are texts, or lists of texts (phrases, segments, documents), none of them empty; token ids must be decoded."
        )
    return [plain_text(u).strip() for u in units]


def _expanded(texts: Sequence[str], options: LibraryOptions) -> dict[str, str]:
    """New texts of public ones, with those that they come of; none where none are asked for.

    Raises:
        ConfigError: more than a library can hold.
    """
    most = _RECOMBINED if options.expand is True else int(options.expand)
    if not 0 <= most <= MAX_ALPHABET:
        raise ConfigError(f"expand must be True, or how many new texts at most, up to {MAX_ALPHABET}.")
    return recombined(texts, min(most, MAX_ALPHABET - len(texts)))


def _recombined_units(
    units: PublicUnits, at: Mapping[str, int], recombined: Mapping[str, str]
) -> PublicUnits:
    """New texts as units of no context, at the first place of the text that each comes of."""
    first = {text: i for i, text in reversed(list(enumerate(units.text.tolist())))}
    shelves = [int(units.shelf[first[at[root]]]) for root in recombined.values()]
    indices = torch.tensor([at[text] for text in recombined], dtype=torch.int64)
    return PublicUnits(indices, torch.full_like(indices, -1), torch.tensor(shelves, dtype=torch.int64))


def _seconds_of_choice(texts: int, width: int) -> float:
    """Of one epsilon, by a product of ones that is timed."""
    few = min(texts, 4096)
    some, others = torch.ones(1024, width), torch.ones(width, few)
    some @ others  # the first one pays for what is set up once
    start = time.perf_counter()
    some @ others
    return _PRODUCTS * (time.perf_counter() - start) * texts / few


def _encode(
    texts: Sequence[str], encode: Encode, options: LibraryOptions, bar: Progress
) -> tuple[Metric, torch.Tensor, torch.Tensor]:
    """The metric, codes [N, p] of length 1, and the probe: codes of the first texts. Of most texts no more than these are ever held."""
    metric: Metric | None = None
    learned = None if options.responses is None else (options.responses, options.alike)
    waiting: list[torch.Tensor] = []
    out: list[torch.Tensor] = []
    probe: torch.Tensor | None = None
    # in a random order, so that the first ones are a fair sample
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(options.seed))
    encode([texts[int(order[0])]])  # the first one pays for what is set up once
    start = time.perf_counter()
    encode([texts[i] for i in order[:_TIMED].tolist()])
    each = (time.perf_counter() - start) / min(_TIMED, len(texts))
    bar.expect("encoding", len(texts), each)
    bar.expect("choosing", len(set(options.epsilons)), _seconds_of_choice(len(texts), options.width))
    bar.begin()
    for codes, new in encode_chunks(
        [texts[i] for i in order.tolist()], encode, options.encoder, options.kept, options.ranks
    ):
        waiting.append(codes)
        bar.step("encoding", len(codes), timed=new)
        if metric is None and sum(map(len, waiting)) >= min(len(texts), _METRIC_TEXTS):
            metric = fit_metric(
                torch.cat(waiting),
                [texts[i] for i in order.tolist()],
                options.width,
                options.flatten,
                learned,
            )
        if metric is not None:
            out += [unit_codes(part, metric[0], metric[1]) for part in waiting]
            waiting = []
    assert metric is not None
    codes = torch.empty(len(texts), metric[1].shape[1])
    codes[order] = torch.cat(out)
    probe = torch.cat(
        [codes for codes, _ in encode_chunks(texts[:PROBES], encode, options.encoder, NOTHING_KEPT)]
    )
    bar.begin()
    return metric, codes, probe


def _public_units(
    texts: Sequence[str], contexts: Sequence[Sequence[str]], recombined: Mapping[str, str], places: Places
) -> PublicUnits:
    at = {text: i for i, text in enumerate(texts)}
    units = PublicUnits(
        torch.tensor([at[text] for context in contexts for text in context]),
        torch.tensor([c for c, context in enumerate(contexts) for _ in context]),
        torch.tensor([s for context in contexts for s in places.shelves(len(context))]),
    )
    return units.joined(_recombined_units(units, at, recombined))


def _plans(
    texts: Sequence[str],
    recombined: Mapping[str, str],
    shelving: Shelving,
    units: PublicUnits,
    unit: str,
    together: int,
    options: LibraryOptions,
    bar: Progress,
) -> tuple[tuple[LibraryPlan, ...], tuple[VotePlan, ...]]:
    """Chosen by contexts that are held out, then made of all: answers for each epsilon, and votes for lists of each size. together: 0, or
    how many parts a context that is one unit has at most."""
    contexts = int(units.context.max()) + 1
    order = torch.randperm(contexts, generator=torch.Generator().manual_seed(options.seed + 1))
    held = torch.isin(units.context, order[: max(1, round(contexts * options.held_out))])
    public, judges = units.where(~held), units.where(held)
    if recombined:  # what can be made without the contexts that judge
        fitted = [texts[i] for i in public.where(public.context >= 0).text.unique().tolist()]
        again = set(_expanded(fitted, options))
        known = torch.tensor([i for i, text in enumerate(texts) if text in again], dtype=torch.int64)
        public = public.where((public.context >= 0) | torch.isin(public.text, known))
    if (
        len(torch.unique(public.text)) < 2
    ):  # next to nothing is there: what is predicted is of what the library holds
        public = judges = units.where(units.context >= 0)
    joint = JointPlanner(shelving, units, public, judges, together) if together else None
    voting = Voting(shelving, public, judges)
    plans, votes = [], []
    for epsilon in sorted(set(map(float, options.epsilons))):
        if joint is None:
            picks = shelving.picks(public, judges, epsilon)
            plans.append(shelving.refitted(picks, units, public, judges, epsilon))
        else:
            plans.append(joint.plan(epsilon))
        if joint is None and unit == "group":
            votes += [voting.refitted(p, units) for p in voting.plans(epsilon, picks)]
        bar.step("choosing")
    return tuple(plans), tuple(votes)
