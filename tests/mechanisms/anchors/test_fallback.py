"""Decoded rows beside rows that do not depend on the release: one softmax, and nothing else at weight 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.fallback import Fallback, Worth, drawn
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.mechanisms.context_rows import ContextRows
from hf_dp_xattn.privacy.bits import SeededEntropy

from .naive_anchors import CHANNELS, decoders, gen, plan

PLAIN = ContextRows(torch.randn(5, CHANNELS, generator=gen(1)), torch.randn(5, generator=gen(2)))
MEAN = Fallback(torch.randn(3, CHANNELS, generator=gen(3)), torch.randn(3, generator=gen(4)))


def worth(weight: float, against: str = "mean") -> Worth:
    return Worth(against, weight, "fvu", 0.8, 0.9)


def sums(rows: torch.Tensor, logs: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum exp(q.k + l) v and the same without v, for keys and values that are the rows."""
    weights = (rows @ query + logs).exp()
    return weights @ rows, weights.sum()


@pytest.mark.parametrize("w", [0.1, 0.6])
def test_one_softmax_over_both(w: float) -> None:
    query = 0.3 * torch.randn(CHANNELS, generator=gen(5))
    found = drawn(PLAIN, worth(w), MEAN)
    top, below = sums(found.rows, found.log_weights, query)
    (a, b), (c, d) = (
        sums(PLAIN.rows, PLAIN.log_weights, query),
        sums(MEAN.rows, MEAN.log_weights, query),
    )
    torch.testing.assert_close(top / below, (w * a + (1 - w) * c) / (w * b + (1 - w) * d))


def test_weight_one_is_the_decoder_and_weight_zero_the_fallback() -> None:
    assert drawn(PLAIN, worth(1.0), MEAN) is PLAIN and drawn(PLAIN, None, MEAN) is PLAIN
    nothing = drawn(PLAIN, worth(0.0), MEAN)
    assert torch.equal(nothing.rows, MEAN.rows) and torch.equal(nothing.log_weights, MEAN.log_weights)


def test_no_context_at_all_is_not_seen_beside_public_rows() -> None:
    found = drawn(PLAIN, worth(0.0, "none"), MEAN)
    query = torch.randn(CHANNELS, generator=gen(6))
    public = torch.zeros(1)
    share = torch.cat([public, found.rows @ query + found.log_weights]).softmax(0)
    assert float(share[1:].sum()) < 1e-12
    lighter = drawn(PLAIN, worth(0.5, "none"), MEAN)
    torch.testing.assert_close(lighter.log_weights.exp(), 0.5 * PLAIN.log_weights.exp())


@pytest.mark.parametrize("release", ["sum", "response", "histogram", "mixed"])
def test_every_release_is_drawn(release: str) -> None:
    """At weight 0 nothing of the release is left, whatever its kind."""
    config = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=4.0)
    parts = decoders("mixed" if release == "mixed" else "")
    own = dataclasses.replace(plan(release), worth=worth(0.0))
    parts = Decoders(parts.slots, parts.cells, parts.move, MEAN)
    prepared = prepare_anchors(config, [own], parts)
    rows = torch.randn(9, CHANNELS, generator=gen(7))
    context = prepared.run(rows, entropy=SeededEntropy(1)).context
    assert context is not None and torch.equal(context.rows, MEAN.rows)
