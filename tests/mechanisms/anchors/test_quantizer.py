from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms import inputs
from hf_dp_xattn.mechanisms.anchors.quantizer import ExactAffine, RowQuantizer
from hf_dp_xattn.privacy.units import unit_and_relation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(C: int, p: int, m: int, seed: int = 0, reach: float = 8.0) -> RowQuantizer:
    gen = generator(seed)
    return RowQuantizer.from_tensors(
        torch.randn(C, generator=gen),
        torch.randn(C, p, generator=gen) / C**0.5,
        torch.randn(m, p, generator=gen),
        reach=reach,
    )


def naive_cells(
    center: torch.Tensor, projection: torch.Tensor, codes: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 twin: (nearest code, squared distances [n, m])."""
    z = (rows.double() - center.double()) @ projection.double()
    distances = (z[:, None] - codes.double()[None]).square().sum(-1)
    return distances.argmin(-1), distances


def exact_cell(q: RowQuantizer, row: list[float]) -> int:
    """The module's four lines in Python integers, one row at a time."""
    a = q.projection

    def clamp(value: int, bits: int) -> int:
        return max(-(2**bits), min(2**bits, value))

    x = [
        clamp(round(Fraction(v - c) * Fraction(s)), 19)
        for v, c, s in zip(row, a.center.tolist(), a.scale.tolist(), strict=True)
    ]
    matrix = [[int(v) for v in line] for line in a.matrix.tolist()]
    z = [sum(x[i] * matrix[i][j] for i in range(len(x))) + int(b) for j, b in enumerate(a.bias.tolist())]
    z = [clamp(round(v * Fraction(2) ** (q.exponent - a.exponent)), q.bits) for v in z]
    distances = [sum((v - int(c)) ** 2 for v, c in zip(z, code, strict=True)) for code in q.codes.tolist()]
    return distances.index(min(distances))


@pytest.mark.parametrize(("C", "p", "m"), [(5, 3, 4), (64, 16, 200), (768, 64, 512)], ids=str)
def test_cells_are_the_nearest_codes(C: int, p: int, m: int) -> None:
    gen = generator(1)
    center, projection = torch.randn(C, generator=gen), torch.randn(C, p, generator=gen) / C**0.5
    codes, rows = torch.randn(m, p, generator=gen), torch.randn(200, C, generator=gen)
    q = RowQuantizer.from_tensors(center, projection, codes, reach=16.0)
    cells = q.cells(rows)
    nearest, distances = naive_cells(center, projection, codes, rows)
    chosen = distances.gather(1, cells[:, None])[:, 0]
    assert torch.all(chosen <= distances.amin(-1) * (1 + 1e-3) + 1e-6)
    assert float((cells == nearest).double().mean()) > 0.99
    z = (rows.double() - center.double()) @ projection.double()
    assert float((q.project(rows) - z).abs().max()) < 1e-3


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_cells_equal_the_integer_twin(seed: int, C: int, p: int, m: int) -> None:
    q = make(C, p, m, seed)
    rows = torch.randn(6, C, generator=generator(seed + 1)) * 10.0 ** (seed % 7 - 2)
    assert q.cells(rows).tolist() == [exact_cell(q, row) for row in rows.double().tolist()]


@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([2**24, 900, 1]),
)
@settings(max_examples=40, deadline=None)
def test_a_rows_cell_does_not_depend_on_other_rows(seed: int, n: int, dtype: torch.dtype, chunk: int) -> None:
    q = make(48, 16, 300, seed % 3)
    gen = generator(seed)
    rows = torch.randn(n, 48, generator=gen, dtype=torch.float64).to(dtype)
    whole, projected = q.cells(rows), q.project(rows)
    order = torch.randperm(n, generator=gen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_CHUNK_ENTRIES", chunk)
        assert torch.equal(q.cells(rows[order]), whole[order])
        assert torch.equal(q.project(rows[order]), projected[order])
    assert torch.equal(torch.cat([q.cells(row[None]) for row in rows]), whole)
    others = torch.randn(2 * n, 48, generator=gen).to(dtype) * 1e4
    assert torch.equal(q.cells(torch.cat([others, rows, others]))[2 * n : 3 * n], whole)
    # a view with other strides
    assert torch.equal(q.cells(torch.cat([rows, rows], dim=1)[:, :48]), whole)


def test_a_float_product_would_depend_on_the_batch() -> None:
    """Power: what the integers are for. The same projection in float32 changes with the batch's shape."""
    gen = generator(0)
    rows, projection = torch.randn(333, 768, generator=gen), torch.randn(768, 64, generator=gen)
    alone = torch.cat([row[None] @ projection for row in rows])
    assert not torch.equal(rows @ projection, alone)
    q = RowQuantizer.from_tensors(torch.zeros(768), projection, torch.zeros(1, 64), reach=8.0)
    assert torch.equal(q.project(rows), torch.cat([q.project(row[None]) for row in rows]))


def test_ties_go_to_the_lowest_index() -> None:
    codes = torch.tensor([[3.0], [1.0], [-1.0], [1.0]])
    q = RowQuantizer.from_tensors(torch.zeros(1), torch.eye(1), codes, reach=4.0)
    assert q.cells(torch.tensor([[0.0], [2.0], [1.0], [-9.0]])).tolist() == [1, 0, 1, 2]
    for m in (2, 17, 4096, 65_536):
        same = RowQuantizer.from_tensors(torch.zeros(2), torch.eye(2), torch.ones(m, 2), reach=4.0)
        assert same.cells(torch.randn(40, 2)).tolist() == [0] * 40


def test_rows_far_outside_are_clamped_to_the_public_range() -> None:
    q = make(6, 4, 50)
    rows = torch.randn(20, 6, dtype=torch.float64, generator=generator(3)) * 1e3
    center = q.projection.center
    inside = center + (rows - center).clamp(-8.0, 8.0)
    assert torch.equal(q.cells(rows), q.cells(inside))
    for huge in (3e38, -1e300):
        row = rows.clone()
        row[0] = huge
        assert torch.equal(q.cells(row)[1:], q.cells(rows)[1:])
        assert torch.equal(q.cells(row)[:1], q.cells((center + huge / abs(huge) * 8.0)[None]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("C", "p"), [(4096, 512), (1, 1), (768, 128)], ids=str)
def test_extreme_rows_stay_exact(C: int, p: int, sign: float) -> None:
    """Every entry at its limit: the products are those of Python integers, below 2^53."""
    matrix = torch.full((C, p), 0.7) * torch.where(torch.arange(C) % 2 == 0, 1.0, sign)[:, None]
    affine = ExactAffine.from_tensors(torch.zeros(C), matrix, reach=1.0, bias=torch.full((p,), 3.0))
    row = 1e9 * torch.where(torch.arange(C) % 2 == 0, 1.0, sign)[None]
    got = affine(row)
    expected = sum(abs(int(v)) for v in affine.matrix[:, 0].tolist()) * 2**19 + int(affine.bias[0])
    assert abs(expected) < 2**53
    assert [int(v) for v in got[0].tolist()] == [expected] * p
    q = RowQuantizer.from_tensors(torch.zeros(C), matrix, torch.full((3, p), -5.0), reach=1.0)
    assert 3 * p * 4**q.bits < 2**53
    assert float(q.codes.abs().max()) <= 2 ** (q.bits - 2)
    assert q.cells(row).tolist() == [0]


def test_memory_is_bounded() -> None:
    """4000 rows against 65,536 codes: the table of distances alone would be 2 GB."""
    script = """
import resource, torch
from hf_dp_xattn.mechanisms.anchors.quantizer import RowQuantizer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

q = RowQuantizer.from_tensors(torch.zeros(16), torch.eye(16), torch.randn(65_536, 16), reach=8.0)
before = peak()
q.cells(torch.randn(4000, 16))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 10**8, f"{int(done.stdout) / 1e9:.2f} GB"


def test_bad_rows_are_refused() -> None:
    q = make(4, 3, 5)
    for bad in (float("nan"), float("inf"), float("-inf")):
        rows = torch.zeros(7, 4)
        rows[3, 2] = bad
        for call in (q.cells, q.project):
            with pytest.raises(ContextError, match="NaN or Inf"):
                call(rows)
    for rows in (
        torch.zeros(4),
        torch.zeros(2, 5),
        torch.zeros(2, 4, dtype=torch.long),
        torch.zeros(1, 2, 4),
    ):
        with pytest.raises(ConfigError, match=r"float tensor \[n, 4\]"):
            q.cells(rows)
    assert q.cells(torch.zeros(0, 4)).shape == (0,)


def test_bad_parameters_are_refused() -> None:
    good = {"center": torch.zeros(4), "projection": torch.ones(4, 3), "codes": torch.ones(5, 3), "reach": 1.0}
    for name, value in (
        ("center", torch.zeros(3)),
        ("center", torch.full((4,), float("nan"))),
        ("projection", torch.ones(4)),
        ("projection", torch.ones(4, 0)),
        ("projection", torch.full((4, 3), float("inf"))),
        ("codes", torch.ones(5, 4)),
        ("codes", torch.ones(0, 3)),
        ("reach", 0.0),
        ("reach", float("nan")),
        ("reach", torch.tensor([1.0, -1.0, 1.0, 1.0])),
    ):
        with pytest.raises(ConfigError):
            RowQuantizer.from_tensors(**{**good, name: value})
    with pytest.raises(ConfigError, match=r"group.*replace_one"):
        unit_and_relation("word", "replace_one")
