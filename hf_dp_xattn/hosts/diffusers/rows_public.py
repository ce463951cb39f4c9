"""What decoded rows are compared with where no attention is: the rows, and the pooled vectors, that the denoiser is given.

The measure is an attention of its own. A public row asks which rows of a prompt are like it (their cosine, as behind a layer norm), and
gets their weighted mean; so rows count as a set, which is how a denoiser without places for text reads them. A pooled vector is the mean of
its channels over all rows. Both are compared in a random projection, which keeps distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ...calibration.anchors.objective import LayerProbe, Objective
from ...calibration.calibration_options import CalibrationOptions
from .rows_encoder import RowsEncoder

SHARPNESS = 8.0  # of the cosine: a row that is alike counts e^8 times one that has nothing in common
KEY_DIM, VALUE_DIM, QUERIES = 64, 256, 256
Project = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rows_objective(
    encoder: RowsEncoder, rows: Sequence[torch.Tensor], options: CalibrationOptions
) -> Objective:
    """Of public prompts' rows [n, C] each."""
    gen = torch.Generator().manual_seed(options.seed)
    text = slice(0, encoder.text_channels)
    known = torch.cat([r[: len(r) - len(encoder.vectors), text] for r in rows[:256]])
    center = known.mean(0)
    turned = _projection(encoder.text_channels, KEY_DIM, gen)

    def keys(states: torch.Tensor) -> torch.Tensor:
        return F.normalize(states[..., text] - center.to(states), dim=-1) @ turned.to(states)

    chosen = torch.randint(0, len(known), (min(QUERIES, len(known)),), generator=gen)
    queries = keys(known[chosen]).unsqueeze(0)
    probes = [LayerProbe(_values(text, gen, keys), SHARPNESS, queries, torch.ones(1))]
    for block in encoder.vectors.values():
        probes.append(LayerProbe(_values(block, gen, _same), 1.0, torch.zeros(1, 1, 1), torch.ones(1)))
    return Objective(probes, encoder.first.to("cpu", torch.float32))


def _same(states: torch.Tensor) -> torch.Tensor:
    return states.new_zeros(*states.shape[:-1], 1)


def _projection(channels: int, most: int, gen: torch.Generator) -> torch.Tensor:
    """[channels, d]: keeps distances on average; the identity where there are few channels."""
    if channels <= most:
        return torch.eye(channels)
    return torch.randn(channels, most, generator=gen) / most**0.5


def _values(block: slice, gen: torch.Generator, keys: Callable[[torch.Tensor], torch.Tensor]) -> Project:
    turned = _projection(block.stop - block.start, VALUE_DIM, gen)

    def project(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys(rows).unsqueeze(1), (rows[..., block] @ turned.to(rows)).unsqueeze(1)

    return project
