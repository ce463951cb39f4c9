"""PreparedAnchors: what is charged, what leaves, units, fall-back at small epsilon, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn import ConfigError, ContextError, DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.anchors import nearest_plan, prepare_anchors
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.mechanisms.anchors.sources import pool
from hf_dp_xattn.mechanisms.context_rows import NEGLIGIBLE, ContextRows
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget, Ledger

from .naive_anchors import CELLS, CHANNELS, SLOTS, decoders, gen, plan
from .noised import code_of

RELEASES = ("sum", "response", "histogram")
N = 9


def rows(seed: int = 0, n: int = N) -> torch.Tensor:
    return torch.randn(n, CHANNELS, generator=gen(seed))


def config(**changes: object) -> DPXAttnConfig:
    return DPXAttnConfig(unit="row", mechanism="anchors", epsilon=4.0).replace(**changes)


GROUPS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])


def groups_for(unit: str) -> torch.Tensor | None:
    return GROUPS if unit == "group" else None


@pytest.mark.parametrize(
    ("release", "unit"),
    [*((r, u) for r in RELEASES for u in ("row", "group", "context")), ("mixed", "row")],
)
def test_what_is_charged_covers_the_config(release: str, unit: str) -> None:
    prepared = prepare_anchors(config(unit=unit), [plan(release)], decoders(release))
    assert epsilon_of(prepared.events, 1e-5) <= 4.0 * (1 + 1e-9)
    result = prepared.run(rows(), groups=groups_for(unit), entropy=SeededEntropy(0))
    g = result.guarantee
    assert (g.mechanism, g.epsilon, g.unit) == ("anchors", 4.0, unit)
    assert g.rows == (None if unit == "context" else N)  # a whole context may be replaced by a longer one
    assert g.units == {"row": N, "group": 3, "context": 1}[unit]
    assert g.clipping and not g.is_private  # a seeded sampler promises nothing
    assert bool(torch.isfinite(result.context.rows).all())


@pytest.mark.parametrize("release", RELEASES)
def test_without_noise_the_code_is_the_naive_one(release: str) -> None:
    """At a huge epsilon the released code is what a float computation gives."""
    p = plan(release, noise=1e-9 if release == "sum" else 1.0 if release == "response" else None)
    prepared = prepare_anchors(config(epsilon=1e6 if release == "sum" else 60.0), [p], decoders())
    x = rows()
    code = code_of(prepared, x, SeededEntropy(0))
    z = (x - p.center) @ p.matrix.T + p.bias
    if release == "sum":
        expected = (z / z.norm(dim=-1, keepdim=True).clamp_min(1.0)).sum(0)
        torch.testing.assert_close(code.float(), expected, rtol=1e-3, atol=0.1)
        return
    if release == "response":
        z = z / z.norm(dim=-1, keepdim=True).clamp_min(1.0)
    cells = torch.cdist(z, p.codes[0]).argmin(1)
    if release == "response":
        torch.testing.assert_close(code.float(), p.codes[0][cells].sum(0), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(code.long(), torch.bincount(cells, minlength=CELLS))


@pytest.mark.parametrize("stages", [2, 3], ids=lambda s: f"S={s}")
def test_later_codebooks_quantise_what_is_left(stages: int) -> None:
    p = plan("response", noise=1.0, stages=stages)
    prepared = prepare_anchors(config(epsilon=60.0), [p], decoders())
    x = rows()
    rest = (x - p.center) @ p.matrix.T + p.bias
    rest = rest / rest.norm(dim=-1, keepdim=True).clamp_min(1.0)
    expected = torch.zeros(x.shape[0], p.codes.shape[-1])
    for codes in p.codes:
        told = codes[torch.cdist(rest, codes).argmin(1)]
        rest, expected = rest - told, expected + told
    code = code_of(prepared, x, SeededEntropy(0))
    torch.testing.assert_close(code.float(), expected.sum(0), rtol=1e-4, atol=1e-4)
    assert len(prepared.events) == stages
    assert epsilon_of(prepared.events, 0.0) <= 60.0 * (1 + 1e-9)


@pytest.mark.parametrize("epsilon", [0.3, 7.0, 11.1], ids=lambda e: f"eps={e:g}")
@pytest.mark.parametrize("stages", [1, 3], ids=lambda s: f"S={s}")
def test_shares_of_several_codebooks_never_exceed_the_budget(stages: int, epsilon: float) -> None:
    """A third of 7 rounds up as a float: the shares are exact fractions, so that a ledger lets the release pass."""
    prepared = prepare_anchors(config(epsilon=epsilon), [plan("response", stages=stages)], decoders())
    assert epsilon_of(prepared.events, 1e-5) <= epsilon
    ledger = Ledger()
    ledger.charge(ledger.digest([b"context"]), prepared.events, Budget(epsilon, 1e-5))


@pytest.mark.parametrize("release", ["sum", "response"])
def test_small_epsilon_falls_back_to_the_public_mean(release: str) -> None:
    """Far below the plan's epsilon, noise and context hardly move the decoded rows from those of the plan's mean code."""
    p = plan(release, noise=2.0 if release == "sum" else 0.9)
    assert p.head is not None
    slots = decoders().slots
    assert slots is not None
    mean = slots.decode(p.head.center, p.head).rows

    def distance(epsilon: float) -> float:
        prepared = prepare_anchors(config(epsilon=epsilon), [p], decoders())
        codes = [code_of(prepared, rows(seed), SeededEntropy(seed)) for seed in range(8)]
        decoded = [prepared.drawn(prepared.decoded(c)).rows for c in codes]
        return float(torch.stack([(d - mean).square().mean() for d in decoded]).mean())

    assert distance(0.05) < 0.05 * distance(4.0)


def test_response_needs_a_public_number_of_units() -> None:
    with pytest.raises(ConfigError, match="add_or_remove_one"):
        prepare_anchors(config(neighboring="add_or_remove_one"), [plan("response")], decoders())


@pytest.mark.parametrize("release", ["sum", "histogram"])
def test_add_or_remove_hides_the_counts(release: str) -> None:
    prepared = prepare_anchors(config(neighboring="add_or_remove_one"), [plan(release)], decoders())
    guarantee = prepared.run(rows(), entropy=SeededEntropy(0)).guarantee
    assert guarantee.rows is None and guarantee.units is None


@pytest.mark.parametrize("release", [*RELEASES, "mixed"])
@pytest.mark.parametrize(
    "bad", [rows()[:0], rows()[:, :-1], rows().long(), rows().index_fill(0, torch.tensor([2]), math.nan)]
)
def test_bad_rows(release: str, bad: torch.Tensor) -> None:
    prepared = prepare_anchors(config(), [plan(release)], decoders(release))
    with pytest.raises((ConfigError, ContextError)):
        prepared.run(bad, entropy=SeededEntropy(0))


def test_groups_only_with_the_unit_group() -> None:
    prepared = prepare_anchors(config(unit="group"), [plan("sum")], decoders())
    with pytest.raises((ConfigError, ContextError), match="groups"):
        prepared.run(rows(), entropy=SeededEntropy(0))


def test_no_plan_and_no_decoder() -> None:
    with pytest.raises(ConfigError, match=r"dpx\.calibrate"):
        prepare_anchors(config(), [], decoders())
    prepared = prepare_anchors(config(), [plan("sum")], Decoders())
    with pytest.raises(ConfigError, match="calibrate again"):
        prepared.run(rows(), entropy=SeededEntropy(0))


def test_nearest_plan_is_by_ratio() -> None:
    plans = [plan("sum", epsilon=e) for e in (1.0, 8.0, 64.0)]
    assert [nearest_plan(plans, e).epsilon for e in (0.1, 2.0, 4.0, 20.0, 30.0, 1e9)] == [1, 1, 8, 8, 64, 64]


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(1e-3, 1e6))
def test_a_units_mean_depends_on_that_unit_alone(seed: int, others: int, size: float) -> None:
    """Bit for bit: permuting, adding and changing other units' rows never moves it."""
    unit = rows(seed, 4)
    alone = pool(unit, "group", torch.zeros(4, dtype=torch.int64))
    foreign = rows(seed + 1, others) * size
    mixed = torch.cat([foreign[:1], unit[:2], foreign[1:], unit[2:]])
    owner = torch.cat([torch.ones(1), torch.zeros(2), torch.ones(others - 1), torch.zeros(2)]).long()
    assert torch.equal(pool(mixed, "group", owner)[0], alone[0])
    torch.testing.assert_close(alone[0].float(), unit.mean(0), rtol=1e-4, atol=1e-5)


def test_pruning_drops_what_no_query_can_see() -> None:
    context = ContextRows(torch.randn(3, 4, generator=gen(0)), torch.tensor([0.0, -NEGLIGIBLE - 1, -3.0]))
    assert context.pruned().rows.shape[0] == 2


def test_slots_serve_fewer_rows_than_a_prompt() -> None:
    prepared = prepare_anchors(config(), [plan("sum")], decoders())
    assert prepared.run(rows(), entropy=SeededEntropy(0)).context.rows.shape[0] <= SLOTS
