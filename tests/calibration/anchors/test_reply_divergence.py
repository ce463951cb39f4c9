"""Divergence of replies: against a naive sum over the whole vocabulary, one context and one text at a time."""

from __future__ import annotations

import pytest
import torch

from hf_dp_xattn.calibration.anchors.reply_divergence import KEPT, Replies, divergence, keep_likeliest


def exact_and_decoded(vocabulary: int, sharp: float) -> tuple[Replies, torch.Tensor, torch.Tensor]:
    """Replies of two contexts, 3 texts each, 7 tokens; the exact logits [2, 3, 7, V] and those of the second text behind decoded rows."""
    g = torch.Generator().manual_seed(vocabulary)
    exact = sharp * torch.randn(2, 3, 7, vocabulary, generator=g, dtype=torch.float64)
    decoded = sharp * torch.randn(2, 7, vocabulary, generator=g, dtype=torch.float64)
    weight = torch.zeros(2, 3, 7)
    weight[0, :, 2:5], weight[1, :, 3:7] = 1, 1
    top, logs = keep_likeliest(exact)
    ids = torch.randint(vocabulary, (2, 3, 7), generator=g).int()
    return Replies(ids, weight, top, logs), exact, decoded


def naive(exact: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    p, q = exact.log_softmax(-1), decoded.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl * weight).sum(-1) / weight.sum(-1)


def of_second_text(replies: Replies, decoded: torch.Tensor) -> torch.Tensor:
    chosen = replies.one_each(torch.ones(2, dtype=torch.int64))
    assert torch.equal(chosen.ids[:, 0], replies.ids[:, 1])
    none = torch.zeros(2, 0)
    return divergence(chosen, none, none, lambda ids, rows, weights: decoded)


@pytest.mark.parametrize("vocabulary", [3, KEPT, KEPT + 1])
def test_is_the_whole_divergence_of_few_words(vocabulary: int) -> None:
    replies, exact, decoded = exact_and_decoded(vocabulary, 2.0)
    found = of_second_text(replies, decoded)
    torch.testing.assert_close(
        found.double(), naive(exact[:, 1], decoded, replies.weight[:, 1]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("sharp", [0.1, 2.0, 30.0])
def test_is_a_lower_bound_for_many_words(sharp: float) -> None:
    replies, exact, decoded = exact_and_decoded(200, sharp)
    found = of_second_text(replies, decoded).double()
    whole = naive(exact[:, 1], decoded, replies.weight[:, 1])
    assert bool((found >= -1e-5).all()) and bool((found <= whole + 1e-4).all())
    if sharp == 2.0:
        assert bool((found > 0.5 * whole).all())


def test_nothing_diverges_from_itself() -> None:
    replies, exact, _ = exact_and_decoded(60, 3.0)
    assert float(of_second_text(replies, exact[:, 1]).abs().max()) < 1e-4


def test_a_certain_reply_has_finite_gradients() -> None:
    replies, _, decoded = exact_and_decoded(60, 200.0)
    decoded.requires_grad_()
    of_second_text(replies, decoded).sum().backward()
    assert decoded.grad is not None and bool(decoded.grad.isfinite().all())
    asked = replies.weight[:, 1].bool()
    assert bool((decoded.grad[~asked] == 0).all()) and bool((decoded.grad[asked] != 0).any())
