from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.kernel_sum.contributions import (
    LayerEncoder,
    sum_rows,
    sum_units,
    unit_contribution,
    unit_rows,
)
from hf_dp_xattn.mechanisms.kernel_sum.features import TaylorFeatures, make_features
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.lattice import lattice_exponent

from .geometries import random_geometry, random_rows
from .naive_kernel_sum import naive_sum

LAYERS = [(2, 4, 3), (3, 5, 2)]  # heads, d, dv


def setup(n: int, *, clip_norm: float, degree: int = 2, kind: str = "taylor", seed: int = 0):  # type: ignore[no-untyped-def]
    geometries = [random_geometry(h, d, dv, seed=i + seed) for i, (h, d, dv) in enumerate(LAYERS)]
    exponent = lattice_exponent(clip_norm)
    encoders = [
        LayerEncoder(
            g, make_features(kind, g.projected_dim, degree=degree, num_features=32, seed=1), exponent
        )
        for g in geometries
    ]
    rows = [random_rows(h, n, d, dv, seed=10 * seed + i) for i, (h, d, dv) in enumerate(LAYERS)]
    keys, values = [r[0] for r in rows], [r[1] for r in rows]
    return geometries, encoders, keys, values, math.floor(clip_norm * 2.0**exponent), exponent


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("clip_norm", [4.0, 30.0])
def test_sum_rows_equals_the_naive_twin(degree: int, clip_norm: float) -> None:
    geometries, encoders, keys, values, bound, exponent = setup(9, clip_norm=clip_norm, degree=degree)
    got = sum_rows(encoders, keys, values, bound)
    expected = naive_sum(geometries, degree, keys, values, clip_norm, [[i] for i in range(9)])
    for layer, heads in zip(got, expected, strict=True):
        reference = torch.stack(heads)
        error = (layer.double() * 2.0**-exponent - reference).norm() / reference.norm()
        assert float(error) < 2e-3, f"degree {degree}: relative error {float(error):.1e}"


@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_sum_units_equals_the_naive_twin(unit: str) -> None:
    geometries, encoders, keys, values, bound, exponent = setup(8, clip_norm=20.0)
    groups = torch.tensor([3, 0, 0, 7, 3, 0, 7, 7]) if unit == "group" else None
    units = unit_rows(unit, 8, groups)
    got = sum_units(encoders, keys, values, bound, units)
    expected = naive_sum(geometries, 2, keys, values, 20.0, [u.tolist() for u in units])
    for layer, heads in zip(got, expected, strict=True):
        reference = torch.stack(heads)
        assert float((layer.double() * 2.0**-exponent - reference).norm() / reference.norm()) < 2e-3


@given(
    st.integers(1, 40),
    st.integers(1, 45),
    st.integers(0, 10**6),
    st.sampled_from(["taylor", "positive_random"]),
)
@settings(max_examples=40, deadline=None)
def test_sum_is_bit_identical_in_any_order_and_chunk_size(n: int, chunk: int, seed: int, kind: str) -> None:
    _, encoders, keys, values, bound, _ = setup(n, clip_norm=5.0, kind=kind, seed=seed % 50)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    whole = sum_rows(encoders, keys, values, bound)
    shuffled = sum_rows(
        encoders, [k[:, order] for k in keys], [v[:, order] for v in values], bound, chunk_size=chunk
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, shuffled, strict=True))
    parts = [
        sum_rows(encoders, [k[:, i : i + 1] for k in keys], [v[:, i : i + 1] for v in values], bound)
        for i in range(n)
    ]
    summed = [torch.stack(layer).sum(0) for layer in zip(*parts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, summed, strict=True)), (
        "a row's integers depend on other rows"
    )


def test_a_float_sum_would_fail_the_bit_identity() -> None:
    """Power: the same sum in float32 does depend on the order."""
    _, encoders, keys, values, _, _ = setup(200, clip_norm=5.0)
    phi, u = encoders[0].factors(keys[0], values[0])
    products = (phi.unsqueeze(-1) * u.unsqueeze(-2)).float() / 3.0
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    a, b = torch.zeros_like(products[:, 0]), torch.zeros_like(products[:, 0])
    for i in range(200):
        a, b = a + products[:, i], b + products[:, order[i]]
    assert not torch.equal(a, b)


@given(st.integers(0, 10**6), st.floats(0.1, 100.0), st.sampled_from(["row", "group", "context"]))
@settings(max_examples=60, deadline=None)
def test_replacing_one_unit_moves_the_release_by_at_most_2c(seed: int, size: float, unit: str) -> None:
    """Sensitivity on real paths, in exact integers, with hostile magnitudes of the replaced rows."""
    n = 6
    _, encoders, keys, values, bound, _ = setup(n, clip_norm=3.0, seed=seed % 20)
    groups = torch.tensor([0, 0, 1, 1, 1, 2]) if unit == "group" else None
    units = unit_rows(unit, n, groups)
    changed = units[seed % len(units)]
    gen = torch.Generator().manual_seed(seed)
    other_keys, other_values = [k.clone() for k in keys], [v.clone() for v in values]
    for k, v in zip(other_keys, other_values, strict=True):
        k[:, changed] = torch.randn(k[:, changed].shape, generator=gen) * size
        v[:, changed] = -torch.randn(v[:, changed].shape, generator=gen) * size

    def total(ks: list[torch.Tensor], vs: list[torch.Tensor]) -> list[torch.Tensor]:
        return (
            sum_rows(encoders, ks, vs, bound) if unit == "row" else sum_units(encoders, ks, vs, bound, units)
        )

    before, after = total(keys, values), total(other_keys, other_values)
    distance = sum(
        int(d) ** 2 for a, b in zip(before, after, strict=True) for d in (a - b).flatten().tolist()
    )
    assert distance <= (2 * bound) ** 2


@given(st.integers(0, 10**6), st.floats(0.1, 100.0))
@settings(max_examples=40, deadline=None)
def test_removing_one_row_moves_the_release_by_at_most_c(seed: int, size: float) -> None:
    _, encoders, keys, values, bound, _ = setup(6, clip_norm=3.0, seed=seed % 20)
    for k, v in zip(keys, values, strict=True):
        k[:, 0], v[:, 0] = k[:, 0] * size, v[:, 0] * size
    whole = sum_rows(encoders, keys, values, bound)
    without = sum_rows(encoders, [k[:, 1:] for k in keys], [v[:, 1:] for v in values], bound)
    distance = sum(
        int(d) ** 2 for a, b in zip(whole, without, strict=True) for d in (a - b).flatten().tolist()
    )
    assert distance <= bound**2


def test_per_layer_clipping_would_break_the_joint_bound() -> None:
    """Power: clipping each layer by itself lets the joint contribution exceed the bound."""
    _, encoders, keys, values, bound, _ = setup(1, clip_norm=1.0)
    parts = [sum_rows([e], [k], [v], bound)[0] for e, k, v in zip(encoders, keys, values, strict=True)]
    assert sum(int(x) ** 2 for p in parts for x in p.flatten().tolist()) > bound**2


@pytest.mark.parametrize("n", [100_000], ids=["n=1e5"])
def test_long_contexts_are_summed_in_chunks(n: int) -> None:
    g = random_geometry(1, 4, 3)
    clip_norm = 5.0
    encoder = LayerEncoder(g, TaylorFeatures(4, 2), lattice_exponent(clip_norm))
    key, value = random_rows(1, 100, 4, 3)
    bound = math.floor(clip_norm * 2.0**encoder.exponent)
    once = sum_rows([encoder], [key], [value], bound)[0]
    many = sum_rows([encoder], [key.repeat(1, n // 100, 1)], [value.repeat(1, n // 100, 1)], bound)[0]
    assert torch.equal(many, once * (n // 100))


def test_bad_rows_are_refused() -> None:
    _, encoders, keys, values, bound, _ = setup(5, clip_norm=5.0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = [k.clone() for k in keys]
        broken[1][0, 2, 0] = bad
        with pytest.raises(ContextError, match="NaN or Inf"):
            sum_rows(encoders, broken, values, bound)
    with pytest.raises(ContextError, match="no rows"):
        sum_rows(encoders, [k[:, :0] for k in keys], [v[:, :0] for v in values], bound)
    with pytest.raises(ContextError, match="same number of rows"):
        sum_rows(encoders, keys, [values[0][:, :4], values[1]], bound)
    with pytest.raises(ConfigError, match="heads"):
        sum_rows(encoders, [keys[1], keys[0]], [values[1], values[0]], bound)


@pytest.mark.parametrize(
    ("unit", "groups"),
    [
        ("group", None),
        ("group", torch.zeros(4)),
        ("group", torch.zeros(3, dtype=torch.long)),
        ("row", torch.zeros(4, dtype=torch.long)),
    ],
    ids=["missing", "float", "length", "superfluous"],
)
def test_bad_groups_are_refused(unit: str, groups: torch.Tensor | None) -> None:
    with pytest.raises(ConfigError, match="groups"):
        unit_rows(unit, 4, groups)


def test_unit_contribution_is_exact_in_integers() -> None:
    _, encoders, keys, values, _, _ = setup(7, clip_norm=5.0)
    whole = unit_contribution(encoders, keys, values, torch.arange(7))
    phi, u = encoders[0].factors(keys[0], values[0])
    exact = (phi.long().unsqueeze(-1) * u.long().unsqueeze(-2)).sum(1)
    assert torch.equal(whole[0].long(), exact)


@pytest.mark.slow
def test_a_million_rows_in_bounded_memory() -> None:
    """Peak memory beyond the rows themselves stays below 1 GB, whatever n (r = 153, 33 value columns, 4 heads)."""
    script = """
import math, resource, torch
from hf_dp_xattn.mechanisms.kernel_sum.contributions import LayerEncoder, sum_rows
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.lattice import lattice_exponent
from hf_dp_xattn.mechanisms.kernel_sum.features import TaylorFeatures
from hf_dp_xattn.mechanisms.kernel_sum.geometry import declared_geometry

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

n = 1_000_000
geometry = declared_geometry(4, 16, 32, scale=0.25, logit_bound=1.0, value_bound=1.0)
encoder = LayerEncoder(geometry, TaylorFeatures(16, 2), lattice_exponent(30.0))
key, value = torch.randn(4, n, 16), torch.randn(4, n, 32)
before = peak()
total = sum_rows([encoder], [key], [value], math.floor(30.0 * 2.0**encoder.exponent))[0]
assert total.dtype == torch.int64 and int(total.abs().max()) > 0
print(peak() - before)
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10**9, f"{int(done.stdout) / 1e9:.2f} GB beyond the rows"


@pytest.mark.parametrize("columns", [3, 2**14, 2**14 + 5, 2**17], ids="r{}".format)
def test_norms_of_extreme_factors_are_exact(columns: int) -> None:
    """All entries at their limit, more columns than one exact product holds: still the exact integer norm."""
    from hf_dp_xattn.mechanisms.kernel_sum.contributions import _square_sum

    x = torch.full((1, 2, columns), 2.0**19, dtype=torch.float64)
    x[:, :, 0] -= 1
    expected = (columns - 1) * 4**19 + (2**19 - 1) ** 2
    assert [int(v) for v in _square_sum(x)[0]] == [int(float(expected))] * 2


@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_heads_that_are_too_wide_are_refused_when_they_are_prepared(mechanism: str) -> None:
    """Not at the release, which is charged before it is computed."""
    spec = LayerSpec("layer", 1, 2048, 4, 0.1)
    with pytest.raises(ConfigError, match="2047"):
        prepare_release(DPXAttnConfig(unit="row", mechanism=mechanism, degree=1), [spec])


def test_more_coordinates_than_can_be_summed_are_refused_when_they_are_prepared() -> None:
    spec = LayerSpec("layer", 64, 64, 128, 0.1)
    with pytest.raises(ConfigError, match="coordinates"):
        prepare_release(DPXAttnConfig(unit="row", mechanism="kernel_sum", degree=2), [spec] * 40)
