"""Any epsilon and delta: a release that costs no more, or a ConfigError that names what to change, before anything can be charged."""

from __future__ import annotations

import math
import time

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.anchors.histogram import prepare_geometric
from hf_dp_xattn.mechanisms.anchors.row_sum import RowSum
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.response import RandomizedResponse

from .anchors.noised import release

SPEC = LayerSpec("attention", 2, 4, 4, 0.5)
ROWS = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
RELATIONS = ("replace_one", "add_or_remove_one")
SECONDS = 20.0  # where exact arithmetic did not end, it took minutes; a busy machine takes a few seconds

epsilons = st.floats(-1074, 1023).map(lambda e: 2.0**e)
deltas = st.one_of(st.floats(-1074, -1).map(lambda e: 2.0**e), st.floats(0.5, 1.0, exclude_max=True))


def check(epsilon: float, delta: float, mechanism: str, relation: str) -> bool:
    """Whether there is such a release."""
    config = DPXAttnConfig(
        unit="row",
        mechanism=mechanism,
        epsilon=epsilon,
        delta=delta,
        neighboring=relation,
        degree=1,
        tree_bins=2,
    )
    start = time.monotonic()
    try:
        prepared = prepare_release(config, [SPEC])
    except ConfigError as error:
        assert "epsilon" in str(error) or "delta" in str(error)
        return False
    finally:
        assert time.monotonic() - start < SECONDS
    assert epsilon_of(prepared.events, delta) <= epsilon
    sums = (
        prepared.run(LayerRows([ROWS[0]], [ROWS[0]])).structures[0].tensors()["sums"]
    )  # after the charge nothing fails
    assert bool(torch.isfinite(sums).all())
    return True


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_releases_of_keys_and_values(mechanism: str, relation: str) -> None:
    @settings(max_examples=12, deadline=None)
    @given(epsilons, deltas)
    @example(1e-6, 1e-5)
    @example(1e308, 1e-5)
    @example(5e-324, 5e-324)
    @example(8.0, 1e-100)
    @example(8.0, 5e-324)
    def law(epsilon: float, delta: float) -> None:
        check(epsilon, delta, mechanism, relation)

    law()
    assert all(check(epsilon, 1e-5, mechanism, relation) for epsilon in (0.5, 8.0, 1e6))


@settings(max_examples=30, deadline=None)
@given(epsilons, deltas, st.sampled_from(RELATIONS))
@example(1e308, 1e-5, "replace_one")
@example(5e-324, 5e-324, "add_or_remove_one")
def test_learned_sums(epsilon: float, delta: float, relation: str) -> None:
    row_sum = RowSum.from_tensors(torch.zeros(4), torch.eye(4), torch.zeros(4), reach=4.0)
    try:
        prepared = row_sum.prepare(epsilon, delta, neighboring=relation)
    except ConfigError as error:
        assert "epsilon" in str(error) or "delta" in str(error)
        return
    assert epsilon_of(prepared.events, delta) <= epsilon
    assert bool(torch.isfinite(release(prepared, ROWS[0, 0])).all())


@settings(max_examples=30, deadline=None)
@given(epsilons, st.sampled_from(RELATIONS))
@example(1e308, "replace_one")
@example(5e-324, "add_or_remove_one")
def test_counts_and_answers(epsilon: float, relation: str) -> None:
    try:
        prepared = prepare_geometric(epsilon, cells=4, unit="row", neighboring=relation)
    except ConfigError as error:
        assert "epsilon" in str(error)
    else:
        counts = prepared.counts(release(prepared, torch.tensor([0, 1, 1])))
        assert bool(torch.isfinite(counts).all())
        assert epsilon_of(prepared.events, 0.0) <= epsilon * (1 + 1e-12)
    response = RandomizedResponse.of(epsilon, 4)
    assert 0 < response.truth <= 1 and math.isfinite(response.truth) and response.epsilon <= epsilon
