"""Public contexts with a structure that a decoder can learn: every row mixes a topic of its context with its position."""

from __future__ import annotations

import torch

from hf_dp_xattn.calibration.anchors.anchors_calibration import HostIdentity
from hf_dp_xattn.calibration.anchors.objective import LayerProbe, Objective
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts
from hf_dp_xattn.calibration.public_data import PublicData

CHANNELS, ROWS, HEADS, DIM, TOPICS = 16, 12, 2, 8, 3


def contexts(count: int, seed: int = 0, *, pooled: bool = False) -> PublicContexts:
    """units [N, U, C] are the rows, or one mean row."""
    fixed = torch.Generator().manual_seed(77)
    directions = torch.randn(TOPICS, CHANNELS, generator=fixed)
    position = 0.3 * torch.randn(ROWS, CHANNELS, generator=fixed)
    g = torch.Generator().manual_seed(seed)
    topics = torch.randint(0, 2, (count, TOPICS), generator=g).float() * 2 - 1
    whole = (
        (topics @ directions).unsqueeze(1) + position + 0.1 * torch.randn(count, ROWS, CHANNELS, generator=g)
    )
    units = whole.mean(1, keepdim=True) if pooled else whole
    return PublicContexts(units.half(), torch.ones(units.shape[:2], dtype=torch.bool), whole.half())


def objective(layers: int = 2, public: int = 1) -> Objective:
    g = torch.Generator().manual_seed(5)
    probes = []
    for _ in range(layers):
        k, v = (torch.randn(CHANNELS, HEADS * DIM, generator=g) * CHANNELS**-0.5 for _ in range(2))

        def project(
            rows: torch.Tensor, k: torch.Tensor = k, v: torch.Tensor = v
        ) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (rows.shape[0], rows.shape[1], HEADS, DIM)
            return (rows @ k).view(shape).transpose(1, 2), (rows @ v).view(shape).transpose(1, 2)

        queries = torch.randn(HEADS, 64, DIM, generator=g)
        probes.append(LayerProbe(project, DIM**-0.5, queries, torch.rand(HEADS, generator=g) + 0.5))
    return Objective(probes, torch.randn(public, CHANNELS, generator=g))


IDENTITY = HostIdentity(
    (("layer", HEADS, CHANNELS, HEADS * DIM),) * 2,
    torch.zeros(2, 2, 16, 16),
    "float32",
    torch.zeros(0, CHANNELS),
)


def public_data(
    public: PublicContexts, reads: Objective | None = None, *, grouping: str = "rows"
) -> PublicData:
    return PublicData(objective() if reads is None else reads, grouping, IDENTITY, public)
