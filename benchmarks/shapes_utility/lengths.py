"""Part c: contexts of k captions' rows side by side (n = 76 k), a small `anchors` calibration for each n, FVU at others' queries.

Two kinds of contexts: of held-out captions, whose combinations no public caption has ("unlike": at large n their mean differs from every
public context's), and for `anchors` also of captions like the public ones ("like": fresh, from the same distribution).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from shapes.private import config
from shapes.scenes import heldout_examples, train_examples
from tqdm.auto import tqdm

from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings
from hf_dp_xattn.calibration.public_data import PublicData
from hf_dp_xattn.hosts.identity import host_identity
from hf_dp_xattn.privacy.bits import SeededEntropy

from .baselines import ResponsePerRow, WienerFilter
from .fvu import Judge, MeanOutput, Released, RowsReleased
from .setting import LENGTHS_SEED, Setting

Part = dict[str, Any]
_PUBLIC_ROWS = 1_200_000  # rows of all public contexts of one n, at most: bounds memory
_MOST, _LEAST = 4000, 160
_BATCH_ROWS = 12_000  # rows of one training batch
_LONG = 1000  # rows from which no decoder is trained: histograms, alone or with a sum beside them
_LONG_PUBLIC_ROWS, _LONG_LEAST = 600_000, 144
_LONG_CELLS = 4  # times fewer cells
_LIKE = 24  # public-like contexts
_SEED = 3000


@dataclass(frozen=True)
class Effort:
    """How a calibration for n rows is fitted: cheaper candidates where each step takes longer."""

    contexts: int
    batch: int
    cells: int
    validation: int
    releases: tuple[str, ...]

    @classmethod
    def of(cls, n: int, cells: int) -> Effort:
        if n < _LONG:
            contexts = max(_LEAST, min(_MOST, _PUBLIC_ROWS // n))
            batch = max(8, min(48, _BATCH_ROWS // n))
            return cls(contexts, batch, cells, 400, ("sum", "histogram", "mixed"))
        contexts = max(_LONG_LEAST, _LONG_PUBLIC_ROWS // n)
        return cls(contexts, 8, cells // _LONG_CELLS, 24, ("histogram", "mixed"))


def side_by_side(setting: Setting, rows: torch.Tensor, k: int, count: int, seed: int) -> torch.Tensor:
    """[count, p + n, C]: the public rows, then k contexts drawn from rows [N, 76, C], none twice if there are enough."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(count, len(setting.first) + k * rows.shape[1], rows.shape[2], dtype=rows.dtype)
    few = len(rows) < count * k
    order = (
        torch.randint(0, len(rows), (count * k,), generator=generator)
        if few
        else torch.randperm(len(rows), generator=generator)
    )
    for i, pick in enumerate(order[: count * k].view(count, k)):
        out[i] = setting.with_public(rows[pick].flatten(0, 1).to(out.dtype))
    return out


def fit(setting: Setting, k: int) -> AnchorCalibration:
    """`anchors` for contexts of k captions, from public captions only."""
    sizes = setting.sizes
    n = k * setting.public.shape[1]
    effort = Effort.of(n, sizes.length_cells)
    count = effort.contexts if sizes.public >= 1000 else 80
    whole = side_by_side(setting, setting.public, k, count, LENGTHS_SEED)
    units = whole[:, len(setting.first) :]
    slots = SlotSettings(batch=effort.batch, layers=3, steps=sizes.length_steps, queries=16)
    settings = AnchorSettings(
        releases=effort.releases,
        anchors=effort.cells,
        epsilons=tuple(map(float, sizes.length_epsilons)),
        tilt_steps=200 if n < _LONG else 60,
        validation=effort.validation,
        slots=slots,
    )
    host = host_identity(setting.layers.values(), setting.pipeline.unet.dtype, setting.text)
    contexts = PublicContexts(units, torch.ones(units.shape[:2], dtype=torch.bool), whole)
    return fit_anchors(config(8.0), PublicData(setting.public_objective, "rows", host, contexts), settings)


def blockwise(method: Any, private: torch.Tensor, epsilon: float, seed: int) -> torch.Tensor:
    """A baseline for single captions on contexts [N, 76 k, C]: every row is released by itself, so blocks are too."""
    width = method.mean.shape[0]
    blocks = private.unflatten(1, (-1, width))
    return method.rows(blocks.flatten(0, 1), epsilon, seed).reshape(private.shape)


def measure_lengths(setting: Setting) -> Iterator[Part]:
    """For each k: anchors and baselines at each epsilon, and the public mean."""
    sizes = setting.sizes
    probes = setting.probes(setting.other_queries)
    baselines = {
        "wiener": WienerFilter(setting.public, joint=False),
        "wiener_joint": WienerFilter(setting.public, joint=True),
        f"response_{sizes.anchors[-1]}": ResponsePerRow(
            setting.public, setting.public_objective, sizes.anchors[-1]
        ),
    }
    part: Part = {"lines": [], "plans": [], "choices": [], "query_source": "single captions' drawings"}
    for k in tqdm(sizes.lengths, desc="c: number of rows"):
        captions = [e.caption for e in heldout_examples(sizes.length_contexts * k, LENGTHS_SEED)]
        whole = side_by_side(
            setting, setting.private_rows(setting.encode(captions)), k, sizes.length_contexts, LENGTHS_SEED
        )
        familiar = [e.caption for e in train_examples(min(_LIKE, sizes.length_contexts) * k, LENGTHS_SEED)]
        alike = side_by_side(
            setting,
            setting.private_rows(setting.encode(familiar)),
            k,
            min(_LIKE, sizes.length_contexts),
            LENGTHS_SEED,
        )
        judges = {kind: Judge(probes, rows) for kind, rows in (("unlike", whole), ("like", alike))}
        rows_of = {kind: setting.private_rows(rows) for kind, rows in (("unlike", whole), ("like", alike))}
        private, n = rows_of["unlike"], rows_of["unlike"].shape[1]

        def add(
            name: str,
            epsilon: float | None,
            released: list[Released],
            kind: str = "unlike",
            k: int = k,
            n: int = n,
        ) -> None:
            against = judges[kind]  # noqa: B023
            summary = against.summary([against.errors(released)])["other"]
            part["lines"].append(
                {
                    "method": name,
                    "kind": kind,
                    "epsilon": epsilon,
                    "captions": k,
                    "rows": n,
                    "contexts": len(released),
                }
                | {key: summary[key] for key in ("fvu", "low", "high")}
            )

        mean = MeanOutput(setting, _public(setting, k))
        for kind, rows in rows_of.items():
            add("public_mean", None, [mean] * len(rows), kind)
        yield part
        calibration = fit(setting, k)
        part["plans"] += [
            {"captions": k, "epsilon": p.epsilon, "release": p.release, "fvu": round(p.quality.fvu, 4)}
            for p in calibration.plans
        ]
        part["choices"] += [{"captions": k, **choice} for choice in calibration.settings["mixed"]]
        for epsilon in sizes.length_epsilons:
            prepared = calibration.prepare(config(epsilon))
            for kind, of_kind in rows_of.items():
                contexts = [
                    prepared.run(rows, entropy=SeededEntropy(_SEED + i)).context
                    for i, rows in enumerate(of_kind)
                ]
                add(
                    "anchors", epsilon, [RowsReleased(setting, c.rows, c.log_weights) for c in contexts], kind
                )
            for name, method in baselines.items():
                rows = blockwise(method, private, epsilon, _SEED)
                add(name, epsilon, [RowsReleased(setting, r) for r in rows])
            yield part


def _public(setting: Setting, k: int) -> torch.Tensor:
    """Public contexts for the mean output; fewer where each is longer."""
    count = max(16, 128 // k)
    return setting.private_rows(side_by_side(setting, setting.public, k, count, LENGTHS_SEED + 1))
