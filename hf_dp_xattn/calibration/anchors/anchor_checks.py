"""Whether plans and decoders fit each other. Privacy does not rest on it; a clear error instead of a late one does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...artefacts.checks import Sizes
from ...errors import ConfigError
from ...mechanisms.anchors.fallback import FALLBACKS
from ...mechanisms.anchors.plan import RELEASES, AnchorPlan, Decoders
from ..stored import CHECKS


def verify_plans(plans: Sequence[AnchorPlan], decoders: Decoders, channels: int) -> None:
    """Raises ConfigError for shapes, NaN, numbers out of range, unknown releases and cells that repeat."""
    shared = CHECKS.sizes(C=channels)
    _verify_decoders(decoders, plans, shared)
    for plan in plans:
        _verify_plan(plan, decoders, shared, channels)


def _verify_decoders(decoders: Decoders, plans: Sequence[AnchorPlan], shared: Sizes) -> None:
    slots, cells, move, fallback = decoders.slots, decoders.cells, decoders.move, decoders.fallback
    if fallback is not None:
        shared.fit("fallback.rows", fallback.rows, "F", "C", floats=True)
        shared.fit("fallback.log_weights", fallback.log_weights, "F", floats=True)
    if slots is not None:
        shared.fit("slots.hidden", slots.hidden, "H", "H")
        shared.fit("slots.slots", slots.slots, "R", "C")
        shared.fit("slots.directions", slots.directions, "L", "C")
        shared.fit("slots.coefficients", slots.coefficients, "R", "L", "H + K")
        shared.fit("slots.weight_map", slots.weight_map, "R", "H + K")
        shared.fit("slots.log_weights", slots.log_weights, "R")
    if cells is not None:
        CHECKS.integer(cells.rows, "cells.rows")
        shared.fit("cells.anchors", cells.anchors, "m", "a", "C")
        shared.fit("cells.coarse", cells.coarse, "m")
        shared.fit("cells.support", cells.support, "J")
        coarse = cells.coarse  # fewer groups than cells: a merged row is made for each
        if coarse.dtype != torch.int64 or bool(((coarse < 0) | (coarse >= len(coarse))).any()):
            CHECKS.refuse("cells.coarse are no groups")
        # a count that no public context had has no mass
        shared.fit("cells.log_prior", cells.log_prior.exp(), "m", "J")
    if move is not None:
        if cells is None or all(p.release != "mixed" for p in plans):
            CHECKS.refuse("a move of anchors that no plan uses")
        shared.fit("move.codes", move.codes, "m", "k")
        shared.fit("move.cross", move.cross, "C", "k")
        shared.fit("move.moment", move.moment, "k", "k")
        shared.fit("move.scale", move.scale)
        if float(move.scale) <= 0 or bool((torch.linalg.eigvalsh(move.moment.double()) <= 0).any()):
            CHECKS.refuse("move.scale or move.moment is not positive")


def _verify_plan(plan: AnchorPlan, decoders: Decoders, shared: Sizes, channels: int) -> None:
    where = f"plan for epsilon {plan.epsilon!r}"
    CHECKS.number(plan.epsilon, f"{where}: epsilon", low=1e-9)
    CHECKS.number(plan.bound, f"{where}: bound", low=1e-9)
    CHECKS.number(plan.share_plus, f"{where}: share_plus", low=1e-6, high=1 - 1e-6)
    CHECKS.number(plan.noise, f"{where}: noise", low=0.0)
    for name in ("fvu", "low", "high"):
        CHECKS.number(getattr(plan.quality, name), f"{where}: {name}")
    CHECKS.integer(plan.quality.contexts, f"{where}: contexts")
    if plan.worth is not None:
        for name in ("ratio", "high"):
            CHECKS.number(getattr(plan.worth, name), f"{where}: {name}", low=0.0)
        CHECKS.number(plan.worth.weight, f"{where}: weight", low=0.0, high=1.0)
        if plan.worth.against not in FALLBACKS or plan.worth.measure not in ("fvu", "divergence"):
            CHECKS.refuse(f"{where}: what it was compared with")
        if not isinstance(plan.worth.unseen_kinds, bool):
            CHECKS.refuse(f"{where}: unseen_kinds is no truth value")
        if plan.worth.unlike is not None:
            CHECKS.number(plan.worth.unlike, f"{where}: unlike", low=0.0)
        if decoders.fallback is None:
            CHECKS.refuse(f"{where}: no fall-back")
    if plan.release not in RELEASES:
        CHECKS.refuse(f"{where}: release {plan.release!r} is unknown")
    sizes = CHECKS.sizes(C=channels)
    sizes.fit(f"{where}: matrix", plan.matrix, "K", "C")
    sizes.fit(f"{where}: bias", plan.bias, "K")
    sizes.fit(f"{where}: center", plan.center, "C")
    sizes.fit(f"{where}: reach", plan.reach, "C")
    sizes.fit(f"{where}: codes", plan.codes, "S", "m", "K")
    if bool((plan.reach < 0).any()):
        CHECKS.refuse(f"{where}: reach is negative")
    stages = sizes["S"]
    by_cells = plan.release in ("histogram", "mixed")
    if (by_cells and stages != 1) or (plan.release == "response" and stages < 1):
        CHECKS.refuse(f"{where}: {stages} codebooks")
    if any(len(torch.unique(codes, dim=0)) < len(codes) for codes in plan.codes):
        raise ConfigError(
            f"The codebook for epsilon = {plan.epsilon:g} has repeated cells, of which one is always empty. Calibrate again."
        )
    slots, cells, head = decoders.slots, decoders.cells, plan.head
    if by_cells and (cells is None or len(cells.anchors) != sizes["m"]):
        CHECKS.refuse(f"{where}: its cells have no decoder")
    if not by_cells and (slots is None or head is None):
        CHECKS.refuse(f"{where}: its code has no decoder")
    move = decoders.move
    if plan.release == "mixed" and (move is None or move.codes.shape[1] != sizes["K"]):
        CHECKS.refuse(f"{where}: its mean code has no move")
    if head is not None:
        if slots is None or shared["H + K"] != shared["H"] + sizes["K"]:
            CHECKS.refuse(f"{where}: the decoder reads other codes")
        sizes.fit(f"{where}: head.weight", head.weight, shared["H"], "K")
        for name in ("bias", "second_bias"):
            sizes.fit(f"{where}: head.{name}", getattr(head, name), shared["H"])
        for name in ("gain", "center"):
            sizes.fit(f"{where}: head.{name}", getattr(head, name), "K")
        sizes.fit(f"{where}: head.scale", head.scale)
        if float(head.scale) <= 0:
            CHECKS.refuse(f"{where}: head.scale is not positive")
    if plan.likeness is not None:
        likeness = plan.likeness
        if plan.worth is None:
            CHECKS.refuse(f"{where}: a likeness without a fall-back")
        for name in ("low", "high"):
            sizes.fit(f"{where}: likeness.{name}", getattr(likeness, name), floats=True)
        sizes.fit(f"{where}: likeness.center", likeness.center, "K", floats=True)
        sizes.fit(f"{where}: likeness.axes", likeness.axes, "W", "K", floats=True)
        sizes.fit(f"{where}: likeness.noise", likeness.noise, "W", floats=True)
        if bool(((likeness.noise < 0) | (likeness.noise >= 1)).any()) or not len(likeness.noise):
            CHECKS.refuse(f"{where}: likeness.noise is no share")
    if plan.tilt is not None:
        sizes.fit(f"{where}: tilt.inner", plan.tilt.inner, "G", "K")
        sizes.fit(f"{where}: tilt.inner_bias", plan.tilt.inner_bias, "G")
        sizes.fit(f"{where}: tilt.outer", plan.tilt.outer, "r", "G")
        sizes.fit(f"{where}: tilt.cells", plan.tilt.cells, "m", "r")
        sizes.fit(f"{where}: tilt.scale", plan.tilt.scale)
        if float(plan.tilt.scale) <= 0:
            CHECKS.refuse(f"{where}: tilt.scale is not positive")
