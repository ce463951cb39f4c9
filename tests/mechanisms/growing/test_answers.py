"""Growing releases: answers against a release at once, and their error over many appends."""

from __future__ import annotations

import math

import pytest
import torch

from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder
from hf_dp_xattn.mechanisms.anchors.sources import AnchorCounts
from hf_dp_xattn.mechanisms.base import LayerSpec, Released, State
from hf_dp_xattn.mechanisms.growing_release import grow
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from hf_dp_xattn.mechanisms.kernel_sum.sketch import SketchPlan
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.accountant import gaussian_sigma_squared
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..anchors.naive_anchors import CELLS, CHANNELS, decoders, gen, plan
from .ways import (
    ANCHORS,
    DIM,
    HEADS,
    KERNEL,
    LOUD,
    SPECS,
    SUMS,
    batch,
    flat,
    joined,
    layer_rows,
    no_noise,
    prepare,
)


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
    assert prepared.plan is not None
    with no_noise():
        growing = prepared.open()
        totals = [
            flat(growing._add(b, None if groups is None else groups[i])[0]) for i, b in enumerate(batches)
        ]
        once = prepared.open()
        whole = flat(once._add(joined(batches), None if groups is None else torch.cat(groups))[0])
    assert float((totals[-1] - whole).abs().max()) <= 3 * 2.0**prepared.plan.shift
    assert float((totals[0] - whole).abs().max()) > 1000 * 2.0**prepared.plan.shift or way == "histogram"


@pytest.mark.parametrize("degree", [1, 2])
def test_kernel_sums_answer_like_attention_over_what_came_so_far(degree: int) -> None:
    config = KERNEL.replace(epsilon=LOUD, degree=degree, logit_bound=1.0)
    growing = grow(prepare_release(config, SPECS), 5).open()
    query = torch.randn(1, HEADS, 7, DIM, generator=gen(9)) * 0.3
    keys, values = [], []
    for t in range(5):
        rows = layer_rows(3 + t, t, 0.7)
        keys.append(rows.keys[1])
        values.append(rows.values[1])
        state = growing.append(rows)
        assert isinstance(state, Released)
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
    at_once = prepare_anchors(config, [p], decoders()).run(rows, entropy=SeededEntropy(0))
    for k, state in enumerate(states):
        assert isinstance(state, Released) and state.context is not None
        torch.testing.assert_close(state.context.rows, at_once.context.rows, rtol=1e-3, atol=1e-3)
        expected = at_once.context.log_weights + math.log(k + 1)
        torch.testing.assert_close(state.context.log_weights, expected, rtol=1e-3, atol=1e-3)


def test_cells_are_counted_and_shrunk_to_the_public_shares() -> None:
    prepared = prepare("histogram", epsilon=LOUD)
    assert prepared.plan is not None and isinstance(prepared.mechanism, AnchorCounts)
    source, rows = prepared.mechanism, torch.randn(40, CHANNELS, generator=gen(2))
    counts = torch.bincount(source.quantizer.cells(rows), minlength=CELLS).double()
    captured: list[torch.Tensor] = []
    original = CellDecoder.decode

    def spy(self: CellDecoder, weights: torch.Tensor) -> object:
        captured.append(weights)
        return original(self, weights)

    noise = prepared.plan.deviation(1) * 2.0**-source.prepared.exponent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellDecoder, "decode", spy)
        prepared.open().append(rows)
        lattice = 2.0**source.prepared.exponent
        source.decode((counts * lattice,), State(40, 40, 1e6 * lattice))
        source.decode((counts * lattice,), State(None, None, 1e-9))
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
    assert prepared.plan is not None and isinstance(prepared.mechanism, PreparedKernelSum)
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
    scale = 2.0**-prepared.mechanism.exponent
    assert seen == [
        (3, prepared.plan.deviation(1) * scale),
        (5, prepared.plan.deviation(2) * scale),
    ]
    assert seen[0][1] < seen[1][1]


def test_error_of_attention_over_a_thousand_appends() -> None:
    """kernel_sum, T = 1000: the normaliser's error stays within the stated bound, and far below a release per append."""
    horizon = 1000
    config = KERNEL.replace(epsilon=1.0, degree=1, value_bound=1.0)
    spec = [LayerSpec("one", 1, 2, 1, 2**-0.5)]
    prepared = grow(prepare_release(config, spec), horizon)
    assert prepared.plan is not None
    source, running = prepared.mechanism, prepared.plan
    growing, exact = prepared.open(SeededEntropy(8)), torch.zeros(source.summed.size, dtype=torch.int64)
    g, errors = gen(0), []
    for _ in range(horizon):
        rows = LayerRows([torch.randn(1, 1, 2, generator=g)], [torch.rand(1, 1, 1, generator=g)])
        exact += flat(source.exact(rows, None))
        total, _ = growing._add(rows, None)
        errors.append(flat(total) - exact)
    error = torch.stack(errors)
    assert float(error.abs().max()) <= running.error_bound(1e-6)
    again = math.sqrt(horizon) * gaussian_sigma_squared(1.0, 1e-5, source.summed.sensitivity) ** 0.5
    assert float(error.square().mean().sqrt()) < again / 8
