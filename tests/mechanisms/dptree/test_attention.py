"""DPTreeSoftmax, DPTreeCrossAttention and mechanism='dptree': answers, guarantees, units, budget, planted bugs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.dptree import DPTreeCrossAttention, DPTreeSoftmax, tree_attention
from hf_dp_xattn.mechanisms.dptree import softmax as softmax_module
from hf_dp_xattn.mechanisms.dptree.dptree import PreparedDPTree
from hf_dp_xattn.mechanisms.dptree.tree_structure import DPTreeStructure
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.features import taylor_relative_error
from hf_dp_xattn.mechanisms.kernel_sum.geometry import HeadGeometry
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.mechanisms.release_attention import release_attention
from hf_dp_xattn.mechanisms.structure import stack
from hf_dp_xattn.privacy.accountant import TruncatedLaplaceEvent, epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..kernel_sum.geometries import random_geometry
from ..paper_bounds import attention_relative_error
from .naive_dptree import naive_softmax, naive_tree_attention
from .test_tree import captured, check_noise, check_sensitivity

LOUD = DPXAttnConfig(unit="row", mechanism="dptree", epsilon=1e9, tree_bins=8)
QUIET = LOUD.replace(epsilon=2.0)


def rows(
    b: int, h: int, n: int, d: int, dv: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    key, query = (torch.randn(b, h, m, d, generator=gen) for m in (n, 9))
    key, query = (t / t.norm(dim=-1, keepdim=True) * d**0.25 * 0.9 for t in (key, query))
    return key, torch.rand(b, h, n, dv, generator=gen), query


def quiet(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return release_attention(*args, **kwargs)


def prepare(
    config: DPXAttnConfig, geometries: list[HeadGeometry], heads: int = 2, d: int = 4, dv: int = 3
) -> PreparedDPTree:
    """A release over layers of given geometries."""

    specs = [LayerSpec(str(i), heads, d, dv, g.scale) for i, g in enumerate(geometries)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "geometry_of", lambda spec, config: geometries[int(spec.name)])
        prepared = prepare_release(config, specs)
    assert isinstance(prepared, PreparedDPTree)
    return prepared


# --- answers


@pytest.mark.parametrize("shape", [(1, 3, 1), (77, 4, 2), (200, 8, 1)], ids=lambda s: "n{}d{}c{}".format(*s))
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_softmax_sums_equal_the_naive_twin(shape: tuple[int, int, int], degree: int) -> None:
    n, d, channels = shape
    key, value, query = rows(1, 1, n, d, channels)
    tree = DPTreeSoftmax.init(key[0, 0], value[0, 0], degree=degree, bins=8, epsilon=1e9, delta=1e-5)
    got = tree.query(query[0, 0])
    half = d**-0.25
    points, queries = (t[0, 0].double() * half for t in (key, query))
    for c in range(channels):
        naive = [
            naive_softmax(points.tolist(), value[0, 0, :, c].tolist(), y, degree) for y in queries.tolist()
        ]
        torch.testing.assert_close(got[:, c], torch.tensor(naive, dtype=torch.float64), rtol=2e-3, atol=2e-3)
    exact = torch.exp(queries @ points.mT) @ value[0, 0].double()
    assert float((got / exact - 1).abs().max()) <= taylor_relative_error(0.81, degree) + 5e-3


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_attend_is_within_the_papers_relative_error(degree: int) -> None:
    key, value, query = rows(2, 3, 77, 8, 5)
    out = quiet(key, value, LOUD.replace(degree=degree)).attend(query)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1) @ value
    bound = attention_relative_error(taylor_relative_error(0.81, degree))
    assert float(((out - exact).abs() / exact).max()) <= bound * 1.01 + 5e-3


@pytest.mark.parametrize("weighted", [True, False], ids=["row weights", "no row weights"])
def test_structure_equals_the_naive_twin_and_the_trees(weighted: bool) -> None:
    geometry = random_geometry(2, 4, 3, seed=5, weighted=weighted)
    gen = torch.Generator().manual_seed(1)
    key, value, query = (torch.randn(2, m, c, generator=gen) for m, c in ((8, 4), (8, 3), (6, 4)))
    prepared = prepare(LOUD.replace(value_bound=20.0), [geometry])
    released = prepared.run(LayerRows([key], [value])).structures[0]
    assert isinstance(released, DPTreeStructure)
    naive = naive_tree_attention(geometry, 2, key, value, query, 0.1)
    torch.testing.assert_close(released.attend(query[None])[0].double(), naive, rtol=1e-2, atol=1e-2)


def test_the_trees_and_what_is_read_of_them_agree_under_noise() -> None:
    key, value, query = rows(1, 2, 30, 4, 3)
    arguments: dict[str, Any] = {"entropy": SeededEntropy(3)}
    tree = DPTreeCrossAttention.init(key[0], value[0], QUIET, **arguments)
    structure = quiet(key, value, QUIET, entropy=SeededEntropy(3)).structure
    torch.testing.assert_close(
        structure.attend(query)[0].double(), tree.query(query[0]), rtol=1e-3, atol=1e-3
    )
    assert float((tree.query(query[0]) - value.mean()).abs().max()) > 1  # it is noise that they agree on


@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_nothing_is_clipped_within_the_declared_bounds(unit: str) -> None:
    key, value, query = rows(1, 2, 12, 4, 3)
    groups = torch.arange(12) // 4 if unit == "group" else None
    config = LOUD.replace(unit=unit, value_bound=1.0 if unit == "row" else 12.0)
    out = quiet(key, value, config, groups=groups).attend(query)
    exact = quiet(key, value, LOUD.replace(mechanism="none")).attend(query)
    assert float((out - exact).norm() / exact.norm()) < 0.1


# --- the guarantee


@pytest.mark.parametrize(
    ("unit", "neighboring"),
    [
        *((unit, "replace_one") for unit in ("row", "group", "context")),
        *((unit, "add_or_remove_one") for unit in ("row", "group")),
    ],
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_sensitivity_of_a_changed_unit(unit: str, neighboring: str, seed: int) -> None:
    """Jointly over two layers, at any size of the rows: what the parts change by is what is charged."""
    geometries = [random_geometry(2, 4, 3, seed=s, weighted=bool(s)) for s in (0, 1)]
    prepared = prepare(QUIET.replace(unit=unit, neighboring=neighboring), geometries)
    gen = torch.Generator().manual_seed(seed)
    size = 10.0 ** (seed % 4 - 1)
    key, value = (torch.randn(2, 2, 6, c, generator=gen) * size for c in (4, 3))
    members = {"row": [0], "group": [0, 1, 2], "context": list(range(6))}[unit]
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, members] = torch.randn(2, 2, len(members), 4, generator=gen) * 30
    other_value[:, :, members] = torch.randn(2, 2, len(members), 3, generator=gen) * 30
    kept = [i for i in range(6) if neighboring == "replace_one" or i not in members]
    groups = torch.tensor([0, 0, 0, 1, 1, 2]) if unit == "group" else None
    with captured() as seen:
        prepared.run(LayerRows(list(key), list(value)), groups=groups)
        if kept:
            chosen = None if groups is None else groups[kept]
            prepared.run(LayerRows(list(other_key[:, :, kept]), list(other_value[:, :, kept])), groups=chosen)
    if not kept:  # the context is gone: all sums are zero
        zero = {name: [torch.zeros_like(t) for t in tensors] for name, tensors in seen[0][1].items()}
        seen.append((seen[0][0], zero))
    check_sensitivity(seen[0], seen[1])


def test_every_part_is_noised_the_norms_the_sums_and_the_normaliser_too() -> None:
    key, value, _ = rows(1, 6, 20, 4, 40)
    with captured() as seen:
        layer = DPTreeCrossAttention.init(
            key[0],
            value[0],
            QUIET.replace(neighboring="add_or_remove_one"),
            entropy=SeededEntropy(2),
        )
    softmax, names = layer.softmax, list(seen[0][1])
    released = {
        n: [
            softmax.distances.distance.levels[n.split(",")[0]][int(n[-1])]
            if "level" in n
            else getattr(softmax, n)
        ]
        for n in names
    }
    assert {"total", "norms"} < set(names) and len(names) == 3 * 4 + 2
    check_noise(*seen[0], released)
    sums = seen[0][1]
    for name in ("norms", "total"):  # the paper's hole, planted: these leave as they are
        step = next(p.step for p in softmax.split.parts if p.name == name)
        with pytest.raises(AssertionError):
            check_noise(*seen[0], {**released, name: [sums[name][0] * step]})
    normalizer = released["total"][0][:, -1] / layer.normalizer_scale
    assert bool((normalizer - 20).abs().gt(1e-3).all()), "the normaliser is private under add_or_remove_one"


def test_the_count_is_public_under_replace_one_only() -> None:
    key, value, _ = rows(1, 1, 30, 4, 4)
    for neighboring, known in (("replace_one", True), ("add_or_remove_one", False)):
        layer = DPTreeCrossAttention.init(key[0], value[0], QUIET.replace(neighboring=neighboring))
        count = float(layer.softmax.total[0, -1] / layer.normalizer_scale[0])
        assert (abs(count - 30) < 1e-9) is known
        guarantee = quiet(key, value, QUIET.replace(neighboring=neighboring)).guarantees[0]
        assert (guarantee.rows == 30) is known and (guarantee.units == 30) is known


def test_the_event_costs_what_the_config_says_and_the_table_adds_up() -> None:
    for epsilon in (0.5, 8.0, 200.0):
        prepared = prepare(QUIET.replace(epsilon=epsilon), [random_geometry(2, 4, 3)])
        (event,) = prepared.events
        assert isinstance(event, TruncatedLaplaceEvent)
        assert 0.99 * epsilon < epsilon_of([event], prepared.config.delta) <= epsilon
        table = prepared.split.table()
        assert math.isclose(sum(r["share"] for r in table), 1.0)
        assert sum(r["l1"] for r in table) == event.sensitivity
        per_level = 2 * 14 * 4  # heads, r - 1, channels with the normaliser
        assert [r["coordinates"] for r in table] == [per_level] * 12 + [2 * 4] * 2
        assert sum(r["delta"] for r in table) <= prepared.config.delta


def test_more_layers_share_the_budget() -> None:
    one, two = (prepare(QUIET, [random_geometry(2, 4, 3, seed=s) for s in range(k)]) for k in (1, 2))
    assert two.split.deviation("total") > 1.2 * one.split.deviation("total")
    assert epsilon_of(two.events, QUIET.delta) <= QUIET.epsilon


def test_seeded_is_reproducible_and_labelled_unseeded_is_neither() -> None:
    key, value, query = rows(1, 2, 10, 4, 4)
    a, b = (quiet(key, value, QUIET, entropy=SeededEntropy(7)) for _ in range(2))
    assert torch.equal(a.attend(query), b.attend(query)) and not a.guarantees[0].is_private
    c, d = (quiet(key, value, QUIET) for _ in range(2))
    assert not torch.equal(c.attend(query), d.attend(query)) and c.guarantees[0].is_private
    assert "(2, 1e-05)" in c.guarantees[0].sentence()


def test_order_and_presence_of_other_rows_do_not_change_a_rows_integers() -> None:
    key, value, _ = rows(1, 2, 12, 4, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with captured() as seen:
        for index in (torch.arange(12), order, torch.arange(5), torch.arange(5, 12)):
            quiet(key[:, :, index], value[:, :, index], QUIET)
    for name in seen[0][1]:
        whole, permuted, first, second = (s[1][name][0] for s in seen)
        assert torch.equal(whole, permuted) and torch.equal(whole, first + second)


# --- the interface


def test_stack_select_and_dtypes() -> None:
    key, value, query = rows(2, 2, 12, 8, 4)
    both = quiet(key, value, LOUD).structure
    swapped = both.select(torch.tensor([1, 0]))
    assert isinstance(swapped, DPTreeStructure)
    torch.testing.assert_close(swapped.attend(query.flip(0)), both.attend(query).flip(0))
    again = stack([swapped.select(torch.tensor([1])), swapped.select(torch.tensor([0]))])
    torch.testing.assert_close(again.attend(query), both.attend(query))
    for dtype in (torch.float16, torch.bfloat16):
        out = quiet(*(t.to(dtype) for t in (key, value)), LOUD).attend(query.to(dtype))
        assert (
            out.dtype == dtype
            and float((out.float() - both.attend(query)).norm() / out.float().norm()) < 0.05
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "positive_random"}, "kernel_sum"),
        ({"degree": 0}, "degree"),
        ({"tree_bins": 4096, "degree": 4}, "kernel_sum"),
    ],
    ids=["features", "degree", "too large"],
)
def test_what_it_cannot_do_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    key, value, _ = rows(1, 1, 5, 16, 8)
    with pytest.raises(ConfigError, match=message):
        quiet(key, value, QUIET.replace(**change))
    with pytest.raises(ContextError, match="NaN"):
        quiet(key * math.nan, value, QUIET)
    with pytest.raises(ConfigError, match="groups"):
        quiet(key, value, QUIET.replace(unit="group"))
    with pytest.raises(ConfigError, match="do not fit"):
        DPTreeSoftmax.init(key[0, 0], value[0, 0, :3], epsilon=1.0, delta=1e-5)


def test_chunks_of_rows_and_the_error_bound_of_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value, query = rows(1, 1, 30_000, 2, 1)
    config = QUIET.replace(epsilon=8.0)
    whole = DPTreeCrossAttention.init(key[0], value[0], config, entropy=SeededEntropy(0))
    exact = DPTreeCrossAttention.init(key[0], value[0], config.replace(epsilon=1e9)).query(query[0])
    bound = whole.error_bound(30_000, 1.0, 1e-3)
    assert float((whole.query(query[0]) - exact).abs().max()) <= bound < 0.5
    twice = DPTreeCrossAttention.init(*(t[0].repeat(1, 2, 1) for t in (key, value)), config)
    assert 1.9 < bound / twice.error_bound(60_000, 1.0, 1e-3) < 2.3  # the paper's 1/n
    assert whole.error_bound(20, 1.0, 1e-3) == math.inf
    monkeypatch.setattr(softmax_module, "_CHUNK", 70_000)
    pieces = DPTreeCrossAttention.init(key[0], value[0], config, entropy=SeededEntropy(0))
    assert torch.equal(pieces.query(query[0]), whole.query(query[0]))
