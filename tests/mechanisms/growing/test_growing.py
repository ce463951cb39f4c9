"""Growing releases: every unit enters once, sensitivity, answers against a release at once, units, horizon, bad input, planted bugs."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn import BudgetExceededError, ConfigError, ContextError, DPXAttnConfig, DPXAttnError
from hf_dp_xattn.mechanisms import contributions, kernel_sum
from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.mechanisms.anchors.release import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.rows import ContextRelease
from hf_dp_xattn.mechanisms.contract import LayerRelease, LayerSpec
from hf_dp_xattn.mechanisms.growing import GrowingRelease, LayerRows, PreparedGrowing, grow
from hf_dp_xattn.mechanisms.growing import sources as sources_module
from hf_dp_xattn.mechanisms.growing.release import ContinualWay
from hf_dp_xattn.mechanisms.growing.sources import CellSource, KernelSource, State
from hf_dp_xattn.mechanisms.kernel_sum import PreparedKernelSum
from hf_dp_xattn.mechanisms.release import prepare_release
from hf_dp_xattn.mechanisms.sketch import SketchBasis, SketchPlan
from hf_dp_xattn.privacy import continual
from hf_dp_xattn.privacy.accountant import GaussianEvent, PureEvent, epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget, Ledger

from ..anchors.naive_anchors import CELLS, CHANNELS, decoders, gen, plan

HEADS, DIM, VALUES = 2, 4, 3
SPECS = [LayerSpec(str(i), HEADS, DIM, VALUES, DIM**-0.5) for i in range(2)]
KERNEL = DPXAttnConfig(mechanism="kernel_sum", epsilon=2.0, degree=2)
ANCHORS = DPXAttnConfig(mechanism="anchors", epsilon=4.0)
LOUD = 1e7  # hardly any noise
WAYS = ["kernel_sum", "sketch", "sum", "histogram", "response"]
SUMS = WAYS[:-1]


def layer_rows(n: int, seed: int = 0, size: float = 1.0) -> LayerRows:
    g = gen(seed)
    keys = [torch.randn(HEADS, n, DIM, generator=g) * size for _ in SPECS]
    return LayerRows(keys, [torch.rand(HEADS, n, VALUES, generator=g) * size for _ in SPECS])


def sketched(prepared: PreparedKernelSum, rank: int = 5, units: int = 10) -> PreparedKernelSum:
    """The same release through a random public sketch."""
    g = gen(7)
    shapes = [(e.geometry.heads, e.features.size, e.geometry.value_dim + 1) for e in prepared.encoders]
    analysis = tuple(torch.randn(*s, rank, generator=g) / 10 for s in shapes)
    basis = SketchBasis(analysis, analysis, tuple(torch.rand(*s, generator=g) for s in shapes))
    eye = torch.eye(rank, dtype=torch.float64)
    zero = torch.zeros(rank, dtype=torch.float64)
    sketch = SketchPlan(
        basis, 30, 1.0, zero + 1, zero, zero, eye * 100, torch.eye(rank, dtype=torch.float64) * 50, units
    )
    return dataclasses.replace(prepared, sketch=sketch, bound=2**30, clip_norm=1.0)


def prepare(way: str, horizon: int = 8, **changes: object) -> PreparedGrowing:
    if way in ("kernel_sum", "sketch"):
        prepared = prepare_release(KERNEL.replace(**changes), SPECS)
        assert isinstance(prepared, PreparedKernelSum)
        return grow(sketched(prepared) if way == "sketch" else prepared, horizon)
    config = ANCHORS.replace(**changes)
    anchors = prepare_anchors(config, [plan(way)], decoders())
    return grow(anchors, horizon, units=6)


def batch(way: str, n: int, seed: int, size: float = 1.0) -> LayerRows | torch.Tensor:
    return (
        layer_rows(n, seed, size)
        if way in ("kernel_sum", "sketch")
        else torch.randn(n, CHANNELS, generator=gen(seed)) * size
    )


def joined(parts: list[LayerRows | torch.Tensor]) -> LayerRows | torch.Tensor:
    tensors = [p for p in parts if isinstance(p, torch.Tensor)]
    if tensors:
        return torch.cat(tensors)
    layers = [p for p in parts if isinstance(p, LayerRows)]
    keys, values = (
        [torch.cat([getattr(p, name)[i] for p in layers], dim=1) for i in range(len(SPECS))]
        for name in ("keys", "values")
    )
    return LayerRows(keys, values)


@contextmanager
def no_noise() -> Iterator[list[torch.Tensor]]:
    """Silent noise; every vector that leaves, in order."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "discrete_gaussian", lambda n, *_, **__: np.zeros(n, dtype=np.int64))
        for cls in (continual._SquareRootStream, continual._TreeStream):

            def spy(self: object, step: int, y: torch.Tensor, original: object = cls.decode) -> torch.Tensor:
                seen.append(y.clone())
                return original(self, step, y)  # type: ignore[operator]

            patch.setattr(cls, "decode", spy)
        yield seen


def run(prepared: PreparedGrowing, batches: list, groups: list | None = None) -> torch.Tensor:  # type: ignore[type-arg]
    """All that leaves, but for the noise."""
    with no_noise() as seen:
        growing = prepared.open()
        for i, b in enumerate(batches):
            growing.append(b, groups=None if groups is None else groups[i])
    return torch.cat(seen)


def squared(a: torch.Tensor, b: torch.Tensor) -> int:
    return sum(int(v) ** 2 for v in (a - b).tolist())


def event_of(prepared: PreparedGrowing) -> GaussianEvent:
    (event,) = prepared.events
    assert isinstance(event, GaussianEvent)
    return event


# --- answers


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("unit", ["row", "group"])
def test_totals_are_those_of_a_release_at_once(way: str, unit: str) -> None:
    """Without noise, the state after three appends is that of one append of all rows."""
    sizes, changes = [4, 1, 3], {"unit": unit}
    batches = [batch(way, n, i) for i, n in enumerate(sizes)]
    groups = None
    if unit == "group":
        groups = [torch.tensor([0, 0, 1, 1]), torch.tensor([2]), torch.tensor([5, 4, 4])]
    prepared = prepare(way, **changes)
    assert isinstance(prepared.way, ContinualWay)
    with no_noise():
        growing = prepared.open()
        totals = [
            growing._run.add(b, None if groups is None else groups[i])[0] for i, b in enumerate(batches)
        ]
        once = prepared.open()
        whole, _ = once._run.add(joined(batches), None if groups is None else torch.cat(groups))
    assert float((totals[-1] - whole).abs().max()) <= 3 * 2.0**prepared.way.plan.shift
    assert float((totals[0] - whole).abs().max()) > 1000 * 2.0**prepared.way.plan.shift or way == "histogram"


@pytest.mark.parametrize("degree", [1, 2])
def test_kernel_sums_answer_like_attention_over_what_came_so_far(degree: int) -> None:
    growing = GrowingRelease.open(KERNEL.replace(epsilon=LOUD, degree=degree, logit_bound=1.0), 5, SPECS)
    query = torch.randn(1, HEADS, 7, DIM, generator=gen(9)) * 0.3
    keys, values = [], []
    for t in range(5):
        rows = layer_rows(3 + t, t, 0.7)
        keys.append(rows.keys[1])
        values.append(rows.values[1])
        state = growing.append(rows)
        assert isinstance(state, LayerRelease)
        out = state.structures[1].attend(query)
        key, value = torch.cat(keys, 1)[None], torch.cat(values, 1)[None]
        exact = torch.softmax(query @ key.mT * DIM**-0.5, -1) @ value
        assert float((out - exact).abs().max()) < (0.03 if degree == 2 else 0.15)
        assert state.guarantee.rows == key.shape[2]


def test_kernel_sums_agree_with_release_attention_in_noise() -> None:
    """The first state of a horizon of 1 has the noise of a release at once: same event, same sigma."""
    config = KERNEL.replace(epsilon=1.0)
    at_once = prepare_release(config, SPECS)
    growing = grow(at_once, 1)
    assert isinstance(at_once, PreparedKernelSum)
    g = growing.open(SeededEntropy(0)).guarantee()
    assert math.isclose(g.sigma, at_once.sigma, rel_tol=0.03)
    assert math.isclose(g.sensitivity, 2 * at_once.clip_norm, rel_tol=0.03)


@pytest.mark.parametrize("way", ["sum", "response"])
def test_slot_decoders_are_shown_the_mean(way: str) -> None:
    """The same rows k times over give the same rows with k times the weight, once noise is small."""
    p = plan(way, noise=1e-9 if way == "sum" else 1.0)
    config = ANCHORS.replace(epsilon=LOUD if way == "sum" else 60.0)
    rows = torch.randn(6, CHANNELS, generator=gen(1))
    growing = grow(prepare_anchors(config, [p], decoders()), 4, units=6).open(SeededEntropy(0))
    states = [growing.append(rows) for _ in range(4)]
    at_once = prepare_anchors(config, [p], decoders()).run_rows(rows, entropy=SeededEntropy(0))
    for k, state in enumerate(states):
        assert isinstance(state, ContextRelease)
        torch.testing.assert_close(state.context.rows, at_once.context.rows, rtol=1e-3, atol=1e-3)
        expected = at_once.context.log_weights + math.log(k + 1)
        torch.testing.assert_close(state.context.log_weights, expected, rtol=1e-3, atol=1e-3)


def test_cells_are_counted_and_shrunk_to_the_public_shares() -> None:
    prepared = prepare("histogram", epsilon=LOUD)
    assert isinstance(prepared.way, ContinualWay) and isinstance(prepared.way.source, CellSource)
    source, rows = prepared.way.source, torch.randn(40, CHANNELS, generator=gen(2))
    counts = torch.bincount(source.quantizer.cells(rows), minlength=CELLS).double()
    captured: list[torch.Tensor] = []
    original = CellDecoder.decode

    def spy(self: CellDecoder, weights: torch.Tensor) -> object:
        captured.append(weights)
        return original(self, weights)

    noise = prepared.way.plan.deviation(1) * 2.0**-source.exponent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellDecoder, "decode", spy)
        prepared.open().append(rows)
        lattice = 2.0**source.exponent
        source.current(State(counts * lattice, 1e6 * lattice, 40, 40))
        source.current(State(counts * lattice, 1e-9, None, None))
    # 20 normal noises, each beyond 6 deviations once in 5e8: false alarms below 1e-7 a run
    assert noise < 1e-3
    torch.testing.assert_close(captured[0].double(), counts, atol=6 * noise, rtol=1e-3)
    cells = decoders().cells
    assert cells is not None
    share = cells.log_prior.exp() @ cells.support
    torch.testing.assert_close(
        captured[1], 40 * share / share.sum(), atol=1e-2, rtol=1e-2
    )  # noise tells nothing
    torch.testing.assert_close(captured[2].double(), counts, atol=1e-3, rtol=1e-3)  # n estimated


def test_a_sketch_is_decoded_with_the_noise_and_units_of_the_moment() -> None:
    prepared = prepare("sketch")
    assert isinstance(prepared.way, ContinualWay) and isinstance(prepared.way.source, KernelSource)
    seen: list[tuple[int, float]] = []
    original = SketchPlan.reconstruct

    def spy(self: SketchPlan, y: torch.Tensor, units: int, sigma: float) -> list[torch.Tensor]:
        seen.append((units, sigma))
        return original(self, y, units, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SketchPlan, "reconstruct", spy)
        growing = prepared.open(SeededEntropy(0))
        for n in (3, 2):
            growing.append(layer_rows(n, n))
    scale = 2.0**-prepared.way.source.exponent
    assert seen == [(3, prepared.way.plan.deviation(1) * scale), (5, prepared.way.plan.deviation(2) * scale)]
    assert seen[0][1] < seen[1][1]


# --- the guarantee


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.parametrize("unit", ["row", "group"])
@pytest.mark.parametrize("neighboring", ["replace_one", "add_or_remove_one"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_sensitivity_of_one_unit_at_any_append(way: str, unit: str, neighboring: str, seed: int) -> None:
    """All vectors of all appends together, against what is charged; the changed unit of any size, at any time."""
    if way == "sketch" and neighboring != "replace_one":
        return
    prepared = prepare(way, horizon=5, unit=unit, neighboring=neighboring)
    rng = np.random.default_rng(seed)
    at, members = int(rng.integers(5)), 1 if unit == "row" else 3
    sizes = [int(rng.integers(1, 4)) for _ in range(5)]
    batches = [batch(way, n, seed + i, 10.0 ** (seed % 4 - 1)) for i, n in enumerate(sizes)]
    before, after = (batch(way, members, seed + 10 + i, 10.0 ** (seed % 5 - 1)) for i in range(2))
    variants = []
    for changed in (before, after):
        parts = [joined([b, changed]) if i == at else b for i, b in enumerate(batches)]
        variants.append(parts)
    if neighboring == "add_or_remove_one":
        variants[1] = batches
    groups = []
    for parts in variants:
        counts = [p.shape[0] if isinstance(p, torch.Tensor) else p.keys[0].shape[1] for p in parts]
        mine = [torch.full((n,), 100 * i) for i, n in enumerate(sizes)]
        groups.append(
            [torch.cat([m, torch.full((n - len(m),), 77)]) for m, n in zip(mine, counts, strict=True)]
        )
    use = [g if unit == "group" else None for g in groups]
    distance = squared(run(prepared, variants[0], use[0]), run(prepared, variants[1], use[1]))
    assert distance <= event_of(prepared).sensitivity ** 2
    assert epsilon_of(prepared.events, 1e-5) <= prepared.config.epsilon * (1 + 1e-9)


def opposite(seed: int) -> tuple[LayerRows, LayerRows]:
    """Two rows of large values of opposite sign: close to the worst change."""
    a = layer_rows(1, seed)
    values = [torch.full_like(v, 1e3) for v in a.values]
    return LayerRows(a.keys, values), LayerRows(a.keys, [-v for v in values])


def worst_change(prepared: PreparedGrowing) -> float:
    """sqrt(distance) / sensitivity for a row that turns round at the first of two appends."""
    rest = layer_rows(2, 3)
    plus, minus = opposite(1)
    a, b = (run(prepared, [joined([rest, x]), rest]) for x in (plus, minus))
    return math.sqrt(squared(a, b)) / event_of(prepared).sensitivity


def test_planted_bugs_are_caught() -> None:
    prepared = prepare("kernel_sum", horizon=2)
    assert 0.6 < worst_change(prepared) <= 1.0
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # a row that enters twice: at its own append and at the next one
        original, late = continual._SquareRootStream.encode, []

        def twice(self: object, step: int, x: torch.Tensor) -> torch.Tensor:
            late.append(x)
            return original(self, step, x + late[step - 1] if step else x)  # type: ignore[arg-type]

        patch.setattr(continual._SquareRootStream, "encode", twice)
        rest, (plus, minus) = layer_rows(2, 3), opposite(1)
        runs = []
        for x in (plus, minus):
            late.clear()
            runs.append(run(prepared, [joined([rest, x]), rest]))
        assert math.sqrt(squared(*runs)) > 1.1 * event_of(prepared).sensitivity
    with pytest.MonkeyPatch.context() as patch:  # an append that is not clipped
        patch.setattr(contributions, "clip_factor", lambda n, bound: torch.ones_like(n, dtype=torch.float64))
        patch.setattr(contributions, "verify_clipped", lambda *_: None)
        assert worst_change(prepared) > 2.0
    with pytest.MonkeyPatch.context() as patch:  # each layer clipped by itself
        original_sum = sources_module.sum_rows

        def apart(encoders: list, keys: list, values: list, bound: int) -> list[torch.Tensor]:  # type: ignore[type-arg]
            return [
                original_sum([e], [k], [v], bound)[0] for e, k, v in zip(encoders, keys, values, strict=True)
            ]

        patch.setattr(sources_module, "sum_rows", apart)
        assert worst_change(prepared) > 1.05


@pytest.mark.parametrize("way", SUMS)
def test_every_number_that_leaves_is_noised(way: str) -> None:
    """The first vector of 400 openings: the noise of each coordinate has the deviation that is stated."""
    prepared = prepare(way, horizon=3)
    assert isinstance(prepared.way, ContinualWay)
    b, source = batch(way, 4, 0), SeededEntropy(4)
    with no_noise():
        exact, _ = prepared.open()._run.add(b, None)
    drawn = []
    for _ in range(400):
        total, deviation = prepared.open(source)._run.add(b, None)
        drawn.append((total - exact) / deviation)
    z = torch.stack(drawn)
    # each variance of 400 draws errs by 7 %; the largest of some hundred coordinates by less than 6 times that
    assert bool(((z.square().mean(0) - 1).abs() < 0.45).all())
    assert float(z.mean(0).abs().max()) < 0.3


def test_one_charge_for_all_appends() -> None:
    ledger, prepared = Ledger(), prepare("kernel_sum", horizon=100, epsilon=1.0)
    digest = ledger.digest([b"stream"])
    ledger.charge(digest, prepared.events, Budget(1.0, 1e-5, "row", "replace_one"))
    growing = prepared.open()
    for t in range(100):
        growing.append(layer_rows(2, t))
    assert len(ledger.entries()) == 1 and ledger.spent(digest, 1e-5) <= 1.0
    with pytest.raises(BudgetExceededError):
        ledger.charge(digest, prepared.events, Budget(1.0, 1e-5, "row", "replace_one"))


def test_response_costs_no_more_for_any_horizon() -> None:
    events = {prepare("response", horizon=h).events for h in (1, 8, 1000)}
    assert len(events) == 1 and all(isinstance(e, PureEvent) for e in events.pop())


def test_responses_of_appends_are_answers_of_their_own_units() -> None:
    """Each append adds the codes of its own units' answers, and asks no earlier unit again."""
    prepared = prepare("response", horizon=4)
    growing = prepared.open(SeededEntropy(3))
    asked: list[int] = []
    original = type(prepared.way.source).cells  # type: ignore[attr-defined]

    def spy(self: object, rows: torch.Tensor, groups: torch.Tensor | None) -> list[torch.Tensor]:
        asked.append(rows.shape[0])
        return original(self, rows, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prepared.way.source), "cells", spy)  # type: ignore[attr-defined]
        for n in (3, 1, 2):
            growing.append(batch("response", n, n))
    assert asked == [3, 1, 2] and growing.units == 6


# --- units, horizon, bad input


@pytest.mark.parametrize("way", WAYS)
def test_groups_enter_once(way: str) -> None:
    growing = prepare(way, unit="group").open()
    growing.append(batch(way, 3, 0), groups=torch.tensor([4, 4, 9]))
    assert (growing.units, growing.next_group) == (2, 10)
    for again in ([9], [10, 4]):
        with pytest.raises(ContextError, match="span two appends"):
            growing.append(batch(way, len(again), 1), groups=torch.tensor(again))
    assert growing.appends == 1  # refused ones do not count
    growing.append(batch(way, 1, 1), groups=torch.tensor([10]))
    assert (growing.units, growing.rows, growing.appends) == (3, 4, 2)


@pytest.mark.parametrize("way", WAYS)
def test_the_horizon_is_the_end(way: str) -> None:
    growing = prepare(way, horizon=2).open()
    for i in range(2):
        growing.append(batch(way, 2, i))
    with pytest.raises(BudgetExceededError, match=r"all 2 appends.*open a new one"):
        growing.append(batch(way, 2, 3))
    closed = prepare(way).open()
    closed.close()
    with pytest.raises(BudgetExceededError, match="closed"):
        closed.append(batch(way, 2, 0))


@pytest.mark.parametrize("way", WAYS)
def test_bad_appends_release_nothing_and_may_be_made_again(way: str) -> None:
    growing = prepare(way, horizon=2).open()
    nan = batch(way, 2, 0)
    (nan if isinstance(nan, torch.Tensor) else nan.keys[1]).view(-1)[3] = math.nan
    other = layer_rows(2) if isinstance(nan, torch.Tensor) else torch.zeros(2, CHANNELS)
    empty = batch(way, 0, 0)
    for bad in (nan, other, empty):
        with pytest.raises((ContextError, ConfigError)):
            growing.append(bad)
    with pytest.raises(ConfigError, match="groups"):
        growing.append(batch(way, 2, 0), groups=torch.zeros(2, dtype=torch.int64))
    assert growing.appends == growing.rows == 0
    growing.append(batch(way, 2, 0))
    growing.append(batch(way, 2, 1))


@pytest.mark.parametrize("way", ["kernel_sum", "sum", "histogram"])
def test_an_empty_append_where_numbers_are_private(way: str) -> None:
    growing = prepare(way, neighboring="add_or_remove_one").open(SeededEntropy(0))
    growing.append(batch(way, 0, 0))
    state = growing.append(batch(way, 2, 0))
    assert state.guarantee.rows is None and state.guarantee.units is None
    assert "number of its rows" not in state.guarantee.clipping


@pytest.mark.parametrize("way", WAYS)
def test_other_failures_close_it(way: str) -> None:
    """After an error from within, the vector may have entered: nothing goes on."""
    prepared = prepare(way)
    growing = prepared.open()

    class Broken(SeededEntropy):
        def random_bytes(self, n: int) -> bytes:
            raise OSError("no entropy")

    broken = prepared.open(Broken(0))
    with pytest.raises(OSError):
        broken.append(batch(way, 2, 0))
    with pytest.raises(BudgetExceededError, match="closed"):
        broken.append(batch(way, 2, 0))
    growing.append(batch(way, 2, 0))


def test_what_cannot_grow_is_refused() -> None:
    for mechanism in ("dptree", "none"):
        with pytest.raises(ConfigError, match="release once"):
            grow(prepare_release(KERNEL.replace(mechanism=mechanism), SPECS), 8)
    for way in WAYS:
        with pytest.raises(ConfigError, match="enters once"):
            prepare(way, unit="context")
    for horizon in (0, -3, 10**6, 2.5, True):
        with pytest.raises(ConfigError, match="horizon"):
            prepare("kernel_sum", horizon=horizon)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="units"):
        grow(prepare_anchors(ANCHORS, [plan("sum")], decoders()), 8)
    with pytest.raises(ConfigError, match="replace_one"):
        prepare("sketch", neighboring="add_or_remove_one")
    with pytest.raises(ConfigError, match="no anchors"):
        bare = prepare_anchors(ANCHORS, [plan("histogram")], Decoders(None, None))
        grow(bare, 8).open().append(torch.zeros(2, CHANNELS))


def test_it_is_neither_pickled_nor_shown() -> None:
    growing = prepare("kernel_sum").open()
    growing.append(layer_rows(2))
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(DPXAttnError, match="private sums"):
            copied(growing)  # type: ignore[operator]
    assert repr(growing) == "GrowingRelease(appends=1 of 8, mechanism='kernel_sum')"
    g = growing.guarantee()
    assert g.is_private and (g.rows, g.units) == (2, 2)
    assert "at most 8 appends" in g.clipping and "once" in g.clipping and "public" in g.clipping


# --- error over many appends


def test_error_of_attention_over_a_thousand_appends() -> None:
    """kernel_sum, T = 1000: the normaliser's error stays within the stated bound, and far below a release per append."""
    horizon = 1000
    config = KERNEL.replace(epsilon=1.0, degree=1, value_bound=1.0)
    spec = [LayerSpec("one", 1, 2, 1, 2**-0.5)]
    prepared = grow(prepare_release(config, spec), horizon)
    assert isinstance(prepared.way, ContinualWay)
    source, running = prepared.way.source, prepared.way.plan
    growing, exact = prepared.open(SeededEntropy(8)), torch.zeros(source.size, dtype=torch.int64)
    g, errors = gen(0), []
    for _ in range(horizon):
        rows = LayerRows([torch.randn(1, 1, 2, generator=g)], [torch.rand(1, 1, 1, generator=g)])
        exact += source.exact(rows, None)
        total, _ = growing._run.add(rows, None)
        errors.append(total - exact)
    error = torch.stack(errors)
    assert float(error.abs().max()) <= running.error_bound(1e-6)
    again = math.sqrt(horizon) * kernel_sum.gaussian_sigma_squared(1.0, 1e-5, source.sensitivity) ** 0.5
    assert float(error.square().mean().sqrt()) < again / 8
