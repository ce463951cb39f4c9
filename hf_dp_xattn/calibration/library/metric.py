"""In which directions of an encoder's codes texts are near each other: found of public texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...errors import ConfigError

Responses = Callable[[Sequence[str]], torch.Tensor]
Metric = tuple[torch.Tensor, torch.Tensor, float]  # centre [C], projection [C, p], reach
_REACH = 8.0  # times the largest coordinate of a public code: what is further out is clamped
_ALIKE = 0.05  # of the mean squared distance of two responses: nearer ones are alike
_RIDGE = 0.01  # of the mean variance between texts that are alike


def fit_metric(
    codes: torch.Tensor,
    texts: Sequence[str],
    width: int,
    flatten: float,
    learned: tuple[Responses, int] | None,
) -> Metric:
    """The leading directions of public codes, each divided by its deviation^flatten; or, where the host's responses tell which texts it
    treats alike, by how much codes of such texts differ (relevant component analysis).

    Args:
        codes: [n, C]. texts: of them. learned: (responses, of how many texts).

    Raises:
        ConfigError: all codes are alike, or the responses are no finite floats [n, d].
    """
    center = codes.mean(0)
    centred = (codes - center).double()
    scatter = centred.mT @ centred / max(1, len(codes) - 1)
    if learned is not None:
        count = min(learned[1], len(codes))
        within = _within(centred[:count], _vectors_of(learned[0], texts[:count]))
        if within is not None:
            values, vectors = torch.linalg.eigh(within)
            white = vectors / (values.clamp_min(0.0) + _RIDGE * values.mean().clamp_min(1e-30)).sqrt()
            kept = torch.linalg.eigh(white.mT @ scatter @ white)[1][:, -width:].flip(1)
            projection = white @ kept
            return center, (projection / projection.abs().max()).float(), _reach(centred)
    values, vectors = torch.linalg.eigh(scatter)
    width = min(width, int((values > values[-1] * 1e-9).sum()))
    if width < 1 or not float(values[-1]) > 0:
        raise ConfigError("The encoder gives the same code for all public texts.")
    kept, deviation = vectors[:, -width:].flip(1), values[-width:].flip(0).sqrt()
    return center, (kept * (deviation / deviation[0]) ** -flatten).float(), _reach(centred)


def _reach(centred: torch.Tensor) -> float:
    return _REACH * float(centred.abs().max())


def _vectors_of(responses: Responses, texts: Sequence[str]) -> torch.Tensor:
    vectors = responses(list(texts))
    if (
        not isinstance(vectors, torch.Tensor)
        or vectors.ndim != 2
        or len(vectors) != len(texts)
        or not bool(vectors.isfinite().all())
    ):
        raise ConfigError("`responses` takes a list of n strings and gives finite floats [n, d].")
    return vectors.detach().to("cpu", torch.float32)


def _within(codes: torch.Tensor, responses: torch.Tensor) -> torch.Tensor | None:
    """[C, C]: covariance of the difference between a text's code and that of the likest other, where they are alike; None: few are."""
    distance = torch.cdist(responses, responses).square().fill_diagonal_(torch.inf)
    spread = 2.0 * float((responses - responses.mean(0)).square().sum(1).mean())
    nearest = distance.argmin(1)
    at = torch.arange(len(codes))
    pair = distance[at, nearest] <= _ALIKE * spread
    if int(pair.sum()) < 16:
        return None
    difference = (codes[at[pair]] - codes[nearest[pair]]) / 2.0**0.5
    within: torch.Tensor = difference.mT @ difference / len(difference)
    return within
