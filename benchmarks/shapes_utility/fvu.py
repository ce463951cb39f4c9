"""Fraction of unexplained variance (FVU) of every layer's and head's cross-attention output, for own and for other contexts' queries.

The definition is `calibration/anchors/objective.py`'s: squared error over the variance around the contexts' mean output at the same
query, heads weighted by their gain, layers averaged; 1 is the public mean's score. With a context's OWN queries (recorded while the
pipeline draws that very context) the variance at each query is taken around the mean output of all contexts at that query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hf_dp_xattn.calibration.anchors.objective import LayerProbe, fvu
from hf_dp_xattn.mechanisms.merge import exact_partial, merge
from hf_dp_xattn.mechanisms.structure import AttentionStructure

from .setting import Setting

QUERIES = ("other", "own")


class Released(Protocol):
    """What layer l's queries [H, m, d] read of one released context: outputs [H, m, dv]."""

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor: ...


class RowsReleased:
    """Rows [R, C] with log weights [R] beside the exact public rows."""

    def __init__(self, setting: Setting, rows: torch.Tensor, log_weights: torch.Tensor | None = None) -> None:
        self._layers = list(setting.layers.values())
        self._rows = setting.with_public(rows.float()).unsqueeze(0)
        weights = torch.zeros(len(rows)) if log_weights is None else log_weights.float()
        self._bias = torch.cat([torch.zeros(len(setting.first)), weights])

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        attn = self._layers[layer]
        key, value = attn.project(self._rows)
        scale = (attn.inner_dim // attn.heads) ** -0.5
        logits = query.unsqueeze(0) @ key.mT * scale + self._bias
        return (torch.softmax(logits, -1) @ value)[0]


class StructuresReleased:
    """One structure per layer (`kernel_sum`, `dptree`) beside the exact public rows."""

    def __init__(
        self, setting: Setting, structures: Sequence[AttentionStructure], public: torch.Tensor
    ) -> None:
        self._layers = list(setting.layers.values())
        self._structures = structures
        self._public = public.float().unsqueeze(0)

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        attn = self._layers[layer]
        key, value = attn.project(self._public)
        scale = (attn.inner_dim // attn.heads) ** -0.5
        wide = query.unsqueeze(0)
        public = exact_partial(wide, key, value, scale)
        return merge(*self._structures[layer].partial(wide), *public)[0][0].to(query.dtype)


class MeanOutput:
    """The mean output over public contexts at each query: no release at all."""

    def __init__(self, setting: Setting, public: torch.Tensor) -> None:
        rows = setting.with_public(public.float())
        self._scales = [(a.inner_dim // a.heads) ** -0.5 for a in setting.layers.values()]
        self._projected = [attn.project(rows) for attn in setting.layers.values()]

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        key, value = self._projected[layer]
        logits = query.unsqueeze(0) @ key.mT * self._scales[layer]
        return (torch.softmax(logits, -1) @ value).mean(0)


class Judge:
    """Exact outputs of the private contexts, against which releases are measured.

    whole [N, n, C]: all rows of each private context, public ones included. own: queries [N, H, m, d] per layer, or None.
    """

    def __init__(
        self,
        probes: Sequence[LayerProbe],
        whole: torch.Tensor,
        own: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._gains = [p.gain.double() for p in probes]
        self._queries: dict[str, Callable[[int, int], torch.Tensor]] = {
            "other": lambda i, l: probes[l].queries
        }
        self._exact: dict[str, list[torch.Tensor]] = {"other": []}
        self.variances: dict[str, torch.Tensor] = {}
        parts = []
        for probe, gain in zip(probes, self._gains, strict=True):
            exact = torch.cat([probe.attend(part, probe.queries) for part in whole.split(8)])
            self._exact["other"].append(exact)
            parts.append(_squares(exact, exact.mean(0), gain))
        self.variances["other"] = torch.stack(parts, 1)
        if own is None:
            return
        self._queries["own"] = lambda i, l: own[l][i]
        self._exact["own"] = []
        parts = []
        for probe, gain, queries in zip(probes, self._gains, own, strict=True):
            exact, mean = zip(*(_own(probe, whole, i, q) for i, q in enumerate(queries)), strict=True)
            self._exact["own"].append(torch.stack(exact))
            parts.append(_squares(torch.stack(exact), torch.stack(mean), gain))
        self.variances["own"] = torch.stack(parts, 1)

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self._exact)

    @torch.no_grad()
    def errors(self, released: Sequence[Released]) -> dict[str, torch.Tensor]:
        """Squared errors [N, L, H] float64 of the first N contexts' releases, gains included, for each set of queries."""
        out: dict[str, list[list[torch.Tensor]]] = {s: [] for s in self.sets}
        for i, context in enumerate(released):
            found: dict[str, list[torch.Tensor]] = {s: [] for s in self.sets}
            for l, gain in enumerate(self._gains):
                queries = [self._queries[s](i, l) for s in self.sets]
                answers = context.attend(l, torch.cat(queries, 1)).split([q.shape[1] for q in queries], 1)
                for s, answer in zip(self.sets, answers, strict=True):
                    found[s].append(_squares(answer, self._exact[s][l][i], gain))
            for s in self.sets:
                out[s].append(found[s])
        return {s: torch.stack([torch.stack(f) for f in out[s]]) for s in self.sets}

    def summary(self, draws: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """FVU, its 95 % interval over contexts (each with all its noise draws), and its parts, for each set of queries."""
        result = {}
        for s in self.sets:
            errors = torch.stack([d[s] for d in draws]).mean(0)
            variances = self.variances[s][: len(errors)]
            low, high = fvu_interval(errors, variances)
            shrink = 1.0 - 1.0 / max(2, len(errors))
            heads = errors.sum(0) / variances.sum(0).clamp_min(1e-30) * shrink
            layers = errors.sum((0, 2)) / variances.sum((0, 2)).clamp_min(1e-30) * shrink
            result[s] = {
                "fvu": round(fvu(errors, variances), 5),
                "low": round(low, 5),
                "high": round(high, 5),
                "layers": [round(v, 4) for v in layers.tolist()],
                "heads": [[round(v, 4) for v in row] for row in heads.tolist()],
            }
        return result


def _squares(out: torch.Tensor, target: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """[..., H, m, dv] -> [..., H]: squared distances, with the heads' gains."""
    return (out.double() - target.double()).square().sum((-2, -1)) * gain


@torch.no_grad()
def _own(
    probe: LayerProbe, whole: torch.Tensor, i: int, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context i's outputs at its own queries, and the mean of all contexts' outputs at them; [H, m, dv] each."""
    outputs = probe.attend(whole, queries)
    return outputs[i], outputs.mean(0)


def fvu_interval(
    errors: torch.Tensor, variances: torch.Tensor, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval over contexts (each with its own noise)."""
    generator = torch.Generator().manual_seed(seed)
    count = errors.shape[0]
    pick = torch.randint(0, count, (draws, count), generator=generator)
    e, v = errors.sum(2), variances.sum(2)
    ratios = (e[pick].sum(1) / v[pick].sum(1).clamp_min(1e-30)).mean(1) * (1.0 - 1.0 / max(2, count))
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high
