"""The measurements: FVU (a), attributes right in pictures (b), and both for larger units (d). Part c is `lengths.py`.

Every part is a generator of its results so far, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from shapes.private import DELTA
from shapes.reader import score
from shapes.tables import PLAIN, PUBLIC, line
from tqdm.auto import tqdm

from hf_dp_xattn.privacy.guessing import guess_bound

from .fvu import Judge
from .methods import Make, Method, catalogue, needs_epsilon, shipped
from .setting import HELDOUT_SEED, Setting, draw

Part = dict[str, Any]
UNITS = ("group", "context")
ONE_DRAW = ("exact", "public_mean", "kernel_sum", "dptree")  # slow to release, or without noise
PRIORS = (1 / 2, 1 / 8, 1 / 1000, 1e-6)
_DRAW_SEED = 1000


def judge(setting: Setting, unit: str) -> Judge:
    """Exact outputs of the held-out prompts as this unit encodes them, at both sets of queries."""
    whole = setting.encode(setting.captions(setting.sizes.contexts, unit))
    own = setting.record(whole, HELDOUT_SEED)
    return Judge(setting.probes(setting.other_queries), whole, own)


def _jobs(setting: Setting, names: list[str]) -> list[tuple[str, float]]:
    every = setting.sizes.epsilons
    return [
        (n, e)
        for n in names
        for e in ((setting.sizes.dptree[1] if n == "dptree" else every) if needs_epsilon(n) else (math.inf,))
    ]


def _fvu_line(setting: Setting, against: Judge, method: Method, name: str, epsilon: float) -> dict[str, Any]:
    count = setting.sizes.dptree[0] if name == "dptree" else setting.sizes.contexts
    captions = setting.captions(setting.sizes.contexts, method.unit)[:count]
    draws = 1 if name in ONE_DRAW else setting.sizes.draws
    errors = [against.errors(method.released(captions, epsilon, _DRAW_SEED + d)) for d in range(draws)]
    return {
        "method": name,
        "unit": method.unit,
        "epsilon": _finite(epsilon),
        "contexts": count,
        "draws": draws,
        **against.summary(errors),
    }


def predicted(method: Method) -> list[dict[str, Any]]:
    """What the calibration itself predicts, from public captions that it was not fitted to; empty for other methods."""
    plans = getattr(getattr(method, "calibration", None), "plans", ())
    return [
        {
            "unit": method.unit,
            "epsilon": p.epsilon,
            "release": p.release,
            "fvu": round(p.quality.fvu, 5),
            "low": round(p.quality.low, 5),
            "high": round(p.quality.high, 5),
        }
        for p in plans
    ]


def measure_fvu(setting: Setting) -> Iterator[Part]:
    """Part a: every method with unit = row."""
    methods, against = catalogue(setting), judge(setting, "row")
    part: Part = {"layers": list(setting.layers), "padding": padding(setting), "lines": []}
    part["predicted"] = predicted(methods["anchors"]())
    for name, epsilon in tqdm(_jobs(setting, list(methods)), desc="a: FVU"):
        part["lines"].append(_fvu_line(setting, against, methods[name](), name, epsilon))
        yield part


def _attributes_line(setting: Setting, method: Method, name: str, epsilon: float) -> dict[str, Any]:
    count = setting.sizes.captions
    captions = setting.captions(count, method.unit)
    images = method.pictures(captions, epsilon, HELDOUT_SEED)
    scenes = [e.scene for e in setting.examples(count)]
    found = line(name, "", score(images, scenes, setting.reader), scenes)
    return {"method": found.pop("series"), "unit": method.unit, **found, "epsilon": _finite(epsilon)}


def _finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


def _references(setting: Setting, unit: str) -> list[dict[str, Any]]:
    """The unprotected pipeline, and the public (empty) prompt."""
    count = setting.sizes.captions
    scenes = [e.scene for e in setting.examples(count)]
    lines = []
    for what, captions in ((PLAIN, setting.captions(count, unit)), (PUBLIC, [""] * count)):
        found = line(what, "", score(draw(setting, captions, HELDOUT_SEED), scenes, setting.reader), scenes)
        lines.append({"method": found.pop("series"), "unit": unit, **found, "epsilon": None})
    return lines


def measure_attributes(setting: Setting) -> Iterator[Part]:
    """Part b: pictures of every method with unit = row. `exact` is the unprotected pipeline."""
    methods = catalogue(setting)
    part: Part = {"lines": _references(setting, "row")}
    names = [n for n in methods if n != "exact"]
    for name, epsilon in tqdm(_jobs(setting, names), desc="b: pictures"):
        part["lines"].append(_attributes_line(setting, methods[name](), name, epsilon))
        yield part


def measure_units(setting: Setting) -> Iterator[Part]:
    """Part d: `anchors` for one phrase and for the whole prompt, FVU and pictures; and what the bounds say for every unit."""
    part: Part = {"fvu": [], "attributes": [], "odds": odds(setting), "predicted": []}
    for unit in UNITS:
        make: Make = lambda unit=unit: shipped(setting, unit)  # type: ignore[misc] # noqa: E731
        method, against = make(), judge(setting, unit)
        part["predicted"] += predicted(method)
        part["attributes"] += _references(setting, unit)
        for epsilon in tqdm(setting.sizes.epsilons, desc=f"d: unit = {unit}"):
            part["fvu"].append(_fvu_line(setting, against, method, f"anchors_{unit}", epsilon))
            part["attributes"].append(_attributes_line(setting, method, f"anchors_{unit}", epsilon))
            yield part


def odds(setting: Setting) -> list[dict[str, float]]:
    """Largest probability that an attacker who knows everything else names the unit rightly."""
    return [
        {"epsilon": e, "prior": p, "bound": guess_bound(e, DELTA, p)}
        for e in setting.sizes.epsilons
        for p in PRIORS
    ]


@torch.no_grad()
def padding(setting: Setting) -> dict[str, float]:
    """How many of the private rows are padding, and how well the last padding row alone tells the middle one (share of its variance)."""
    captions = setting.captions(setting.sizes.contexts)
    tokens = [int(setting.text.tokenize(c)[1].sum()) for c in captions]
    rows = setting.private_rows(setting.encode(captions))
    first = max(tokens) + 1  # beyond every caption's end
    middle, last = rows[:, (first + rows.shape[1]) // 2], rows[:, -1]
    public = setting.public.float()
    x, y = (public[:, i] - public[:, i].mean(0) for i in (-1, (first + rows.shape[1]) // 2))
    ridge = 1e-4 * float(x.square().mean()) * len(x) * torch.eye(x.shape[1])
    linear = torch.linalg.solve(x.mT @ x + ridge, x.mT @ y)
    guess = public[:, (first + rows.shape[1]) // 2].mean(0) + (last - public[:, -1].mean(0)) @ linear
    spread = (middle - middle.mean(0)).square().sum()
    pads = [setting.text.length - t for t in tokens]
    return {
        "rows": rows.shape[1],
        "padding_min": min(pads),
        "padding_mean": sum(pads) / len(pads),
        "explained_by_last": float(1 - (middle - guess).square().sum() / spread),
    }
