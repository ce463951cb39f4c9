from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.calibration.calibration import Calibration
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.contributions import unit_rows
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from hf_dp_xattn.mechanisms.kernel_sum.sketch import clip_sketch, sketch_units, sum_sketch
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..sealed import write_sealed
from .synthetic import ROWS, SyntheticModel

MODEL = SyntheticModel()
CONFIG = DPXAttnConfig(mechanism="kernel_sum", unit="row", projection_dim=0, logit_bound=1.0)
CALIBRATION = MODEL.calibrate(CONFIG)


def fvu(config: DPXAttnConfig, calibration: Calibration | None, contexts: int = 24) -> float:
    """Fraction of the output's variance over contexts that is left unexplained; 1.0 is the public mean alone."""
    prepared = prepare_release(config, MODEL.specs, calibration)
    outs: list[torch.Tensor] = []
    exacts: list[torch.Tensor] = []
    for i, x in enumerate(MODEL.contexts(contexts, seed=99)):
        keys, values = MODEL.rows(x)
        released = prepared.run(LayerRows(keys, values), entropy=SeededEntropy(i))
        pairs = list(zip(released.structures, MODEL.queries, keys, values, MODEL.specs, strict=True))
        outs.append(torch.cat([s.attend(q[None])[0].flatten() for s, q, *_ in pairs]))
        exacts.append(
            torch.cat(
                [(torch.softmax(q @ k.mT * spec.scale, -1) @ v).flatten() for _, q, k, v, spec in pairs]
            )
        )
    exact = torch.stack(exacts)
    return float((torch.stack(outs) - exact).square().sum() / (exact - exact.mean(0)).square().sum())


def test_a_calibration_beats_declared_bounds_and_never_the_public_mean_by_less() -> None:
    for epsilon in (1.0, 8.0):
        with_calibration = fvu(CONFIG.replace(epsilon=epsilon), CALIBRATION)
        without = fvu(CONFIG.replace(epsilon=epsilon), None)
        assert with_calibration < 0.5 * without
        assert with_calibration < 1.05, "the decoder must not be worse than the public mean"
    assert fvu(CONFIG.replace(epsilon=1000.0), CALIBRATION) < fvu(CONFIG.replace(epsilon=1.0), CALIBRATION)


def test_without_a_sketch_large_epsilon_is_limited_by_the_features_only() -> None:
    full = dataclasses.replace(CALIBRATION, basis=None, plans=(), clip_norm=10 * CALIBRATION.clip_norm)
    assert fvu(CONFIG.replace(epsilon=1e9, degree=2), full) < 0.02


def test_predicted_fvu_is_close_to_what_is_measured() -> None:
    for plan in CALIBRATION.plans[:2]:
        measured = fvu(CONFIG.replace(epsilon=plan.epsilon), CALIBRATION, contexts=80)
        assert abs(measured - plan.predicted_fvu) < 0.35 * max(measured, plan.predicted_fvu) + 0.03


def test_row_weights_are_optional() -> None:
    weighted = MODEL.calibrate(CONFIG, row_weight_spread=0.3)
    assert all(bool(g.weight_map.any()) for g in weighted.geometries)
    assert not any(bool(g.weight_map.any()) for g in CALIBRATION.geometries)
    assert fvu(CONFIG.replace(epsilon=1000.0), weighted) < 0.8


@pytest.mark.parametrize("unit", ["row", "context"])
def test_units(unit: str) -> None:
    config = CONFIG.replace(unit=unit, epsilon=1000.0)
    calibration = MODEL.calibrate(config, count=80)
    assert fvu(config, calibration) < 0.8
    assert calibration.units == (ROWS if unit == "row" else 1)


def test_groups() -> None:
    config = CONFIG.replace(unit="group", epsilon=1000.0)
    groups = torch.arange(ROWS) // 5
    calibration = MODEL.calibrate(config, count=80, groups=groups)
    keys, values = MODEL.rows(MODEL.contexts(1, seed=5)[0])
    guarantee = (
        prepare_release(config, MODEL.specs, calibration)
        .run(LayerRows(keys, values), groups=groups)
        .guarantee
    )
    assert guarantee.units == 4 and guarantee.is_private and "group" in guarantee.sentence()


@given(st.integers(0, 10**6), st.floats(0.1, 1e4), st.sampled_from([1.0, 8.0, 1000.0]))
@settings(max_examples=40, deadline=None)
def test_sensitivity_of_the_sketch_exact(seed: int, size: float, epsilon: float) -> None:
    """Replacing one row by anything moves the integer sketch by at most 2 C."""
    prepared = prepare_release(CONFIG.replace(epsilon=epsilon), MODEL.specs, CALIBRATION)
    assert isinstance(prepared, PreparedKernelSum) and prepared.sketch is not None
    x = MODEL.contexts(1, seed=seed)[0]
    y = x.clone()
    y[seed % ROWS] = size * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(seed))
    units = unit_rows("row", ROWS, None)
    a, b = (
        sum_sketch(prepared.encoders, *MODEL.rows(t), prepared.bound, units, prepared.sketch) for t in (x, y)
    )
    assert sum(int(v) ** 2 for v in (a - b).tolist()) <= (2 * prepared.bound) ** 2


def test_clipping_the_sum_instead_of_the_rows_would_break_it() -> None:
    """Power: clip once, after summing, and one hostile row moves the result further than 2 C allows per row."""
    plan = prepare_release(CONFIG, MODEL.specs, CALIBRATION).sketch  # type: ignore[attr-defined]
    rows = torch.zeros(4, plan.rank, dtype=torch.float64) + plan.center
    rows[0, 0] += 100 * plan.clip_norm / float(plan.weight[0])
    bound = math.floor(plan.clip_norm * 2.0**plan.exponent)
    clipped = clip_sketch(rows, plan.weight, plan.center, plan.exponent, bound).sum(0)
    unclipped = ((rows - plan.center) * plan.weight).sum(0) * 2.0**plan.exponent
    assert float(clipped.norm()) <= bound < 2 * bound < float(unclipped.norm())


def test_sketch_is_bit_identical_in_any_order() -> None:
    prepared = prepare_release(CONFIG, MODEL.specs, CALIBRATION)
    assert isinstance(prepared, PreparedKernelSum) and prepared.sketch is not None
    keys, values = MODEL.rows(MODEL.contexts(1, seed=3)[0])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    matrices = prepared.sketch.matrices()
    units = unit_rows("row", ROWS, None)
    whole = sketch_units(prepared.encoders, keys, values, units, matrices)
    shuffled = sketch_units(
        prepared.encoders, [k[:, order] for k in keys], [v[:, order] for v in values], units, matrices
    )
    assert torch.equal(whole[order], shuffled)
    alone = [
        sketch_units(
            prepared.encoders,
            [k[:, i : i + 1] for k in keys],
            [v[:, i : i + 1] for v in values],
            units[:1],
            matrices,
        )
        for i in range(ROWS)
    ]
    assert torch.equal(torch.cat(alone), whole), "a row's sketch depends on other rows"


def test_sketch_equals_a_float_twin() -> None:
    prepared = prepare_release(CONFIG, MODEL.specs, CALIBRATION)
    assert isinstance(prepared, PreparedKernelSum) and prepared.sketch is not None
    keys, values = MODEL.rows(MODEL.contexts(1, seed=3)[0])
    got = sketch_units(
        prepared.encoders, keys, values, unit_rows("row", ROWS, None), prepared.sketch.matrices()
    )
    expected = torch.zeros(ROWS, prepared.sketch.rank, dtype=torch.float64)
    for encoder, k, v, analysis in zip(
        prepared.encoders, keys, values, CALIBRATION.basis.analysis, strict=True
    ):  # type: ignore[union-attr]
        phi, u = encoder.factors(k, v)
        for i in range(ROWS):
            outer = phi[:, i].unsqueeze(-1) * u[:, i].unsqueeze(-2) * 2.0**-encoder.exponent
            expected[i] += (outer.unsqueeze(-1) * analysis.double()[..., : prepared.sketch.rank]).sum(
                (0, 1, 2)
            )
    assert float((got - expected).norm() / expected.norm()) < 1e-3


def test_add_or_remove_falls_back_to_the_full_release() -> None:
    """The sketch's centring adds N times a public mean back, which needs a public N."""
    prepared = prepare_release(CONFIG.replace(neighboring="add_or_remove_one"), MODEL.specs, CALIBRATION)
    assert isinstance(prepared, PreparedKernelSum) and prepared.sketch is None


def test_save_and_load(tmp_path: Path) -> None:
    CALIBRATION.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    keys, values = MODEL.rows(MODEL.contexts(1, seed=3)[0])
    outs = [
        prepare_release(CONFIG, MODEL.specs, c)
        .run(LayerRows(keys, values), entropy=SeededEntropy(0))
        .structures[0]
        .attend(MODEL.queries[0][None])
        for c in (CALIBRATION, loaded)
    ]
    assert torch.equal(*outs)
    assert not list(tmp_path.glob("*.pkl")) and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "schema", "unknown key", "missing key", "no tensors", "not json"]
)
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    CALIBRATION.save_pretrained(tmp_path)
    header, tensors = tmp_path / "dp_xattn_calibration.json", tmp_path / "dp_xattn_calibration.safetensors"
    payload = bytearray(tensors.read_bytes())
    values = json.loads(header.read_text())
    if damage == "truncate":
        tensors.write_bytes(payload[:-100])
    elif damage == "flip":
        payload[-1] ^= 1
        tensors.write_bytes(payload)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "not json":
        header.write_text(header.read_text()[:-30])
    else:
        if damage == "schema":
            values["schema_version"] = 99
        elif damage == "unknown key":
            values["extra"] = 1
        else:
            del values["units"]
        write_sealed(header, values)
    with pytest.raises(ConfigError):
        Calibration.from_pretrained(tmp_path)


def test_a_calibration_for_another_model_or_setting_is_refused() -> None:
    other = [LayerSpec("layer0", 2, 4, 4, 0.5), LayerSpec("other", 2, 6, 6, 0.4)]
    with pytest.raises(ConfigError, match="another model"):
        prepare_release(CONFIG, other, CALIBRATION)
    for change in ({"degree": 3}, {"logit_bound": 2.0}, {"unit": "context"}):
        with pytest.raises(ConfigError, match="Calibrate again"):
            prepare_release(CONFIG.replace(**change), MODEL.specs, CALIBRATION)


def test_too_few_contexts() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        MODEL.calibrate(CONFIG, count=4)
