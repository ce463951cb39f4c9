"""`AnchorCalibration` on disk: JSON for what a person reads, safetensors for the rest. Read strictly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...mechanisms.anchors.cells import CellDecoder, Tilt
from ...mechanisms.anchors.move import RowMove
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.anchors.slots import SlotDecoder, SlotHead
from ..checks import check_keys
from ..stored import JSON_NAME, Tensors, read_header, read_stored, write_stored

if TYPE_CHECKING:
    from .anchors_calibration import AnchorCalibration

KIND = "anchors"
# what is stored in half precision
HALF = ("matrix", "weight", "hidden", "coefficients", "directions", "anchors", "inner", "outer", "cells")
_FIELDS = ("unit", "neighboring", "grouping", "channels", "contexts", "units", "settings")
_KEYS = {
    *("kind", "host", "plans", "scores", "has_slots", "cells"),
    *_FIELDS,
}
_PLAN_KEYS = {*AnchorPlan.FIELDS, "quality", "has_head", "has_tilt"}


def tensors_of(calibration: AnchorCalibration) -> dict[str, torch.Tensor]:
    """All tensors by the names that they have in the file, in the precision that they are stored in."""
    out = {"host.sketch": calibration.host.sketch, "host.probe": calibration.host.probe}

    def add(prefix: str, part: Any) -> None:
        if part is not None:
            for name in part.TENSORS:
                value = getattr(part, name)
                out[f"{prefix}.{name}"] = value.half() if name in HALF else value

    add("slots", calibration.decoders.slots)
    add("cells", calibration.decoders.cells)
    add("move", calibration.decoders.move)
    for i, plan in enumerate(calibration.plans):
        add(f"plan.{i}", plan)
        add(f"plan.{i}.head", plan.head)
        add(f"plan.{i}.tilt", plan.tilt)
    return out


def save_anchors(calibration: AnchorCalibration, folder: Path) -> None:
    """Writes the two files."""
    cells = calibration.decoders.cells
    header = {
        "kind": KIND,
        **{name: getattr(calibration, name) for name in _FIELDS},
        "host": {"layers": [list(x) for x in calibration.host.layers], "dtype": calibration.host.dtype},
        "plans": [
            {
                **{name: getattr(p, name) for name in AnchorPlan.FIELDS},
                "quality": dataclasses.asdict(p.quality),
                "has_head": p.head is not None,
                "has_tilt": p.tilt is not None,
            }
            for p in calibration.plans
        ],
        "scores": [dataclasses.asdict(s) for s in calibration.scores],
        "has_slots": calibration.decoders.slots is not None,
        "cells": None if cells is None else {"rows": cells.rows},
    }
    write_stored(folder, header, tensors_of(calibration))


def load_anchors(folder: Path) -> AnchorCalibration:
    """Reads and checks the two files; raises ConfigError on anything missing, unknown, damaged or of another schema."""
    header = read_header(folder, _KEYS, KIND)

    def build(tensors: Tensors) -> AnchorCalibration:
        wide = {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}
        calibration = _read(header, wide)
        calibration.verify()
        return calibration

    return read_stored(folder, header, build, tensors_of)


def rounded(calibration: AnchorCalibration) -> AnchorCalibration:
    """The calibration as a file would give it back: large tensors in half precision."""
    tensors = {
        k: v.half().float() if k.split(".")[-1] in HALF else v for k, v in tensors_of(calibration).items()
    }
    cells = calibration.decoders.cells
    return dataclasses.replace(
        calibration,
        plans=tuple(_round_plan(p, i, tensors) for i, p in enumerate(calibration.plans)),
        decoders=Decoders(
            None if calibration.decoders.slots is None else _part(SlotDecoder, "slots", tensors),
            None if cells is None else _part(CellDecoder, "cells", tensors, rows=cells.rows),
            None if calibration.decoders.move is None else _part(RowMove, "move", tensors),
        ),
    )


def _part(kind: Any, prefix: str, tensors: dict[str, torch.Tensor], **extra: Any) -> Any:
    return kind(**{n: tensors[f"{prefix}.{n}"] for n in kind.TENSORS}, **extra)


def _round_plan(plan: AnchorPlan, i: int, tensors: dict[str, torch.Tensor]) -> AnchorPlan:
    parts: dict[str, Any] = {n: tensors[f"plan.{i}.{n}"] for n in AnchorPlan.TENSORS}
    return dataclasses.replace(
        plan,
        **parts,
        head=None if plan.head is None else _part(SlotHead, f"plan.{i}.head", tensors),
        tilt=None if plan.tilt is None else _part(Tilt, f"plan.{i}.tilt", tensors),
    )


def _read_plan(i: int, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AnchorPlan:
    check_keys(entry, _PLAN_KEYS, f"plan {i} of {JSON_NAME}")
    prefix = f"plan.{i}"
    own: dict[str, Any] = {n: tensors[f"{prefix}.{n}"] for n in AnchorPlan.TENSORS}
    return AnchorPlan(
        **{n: entry[n] for n in AnchorPlan.FIELDS},
        **own,
        head=_part(SlotHead, f"{prefix}.head", tensors) if entry["has_head"] else None,
        tilt=_part(Tilt, f"{prefix}.tilt", tensors) if entry["has_tilt"] else None,
        quality=Quality(**entry["quality"]),
    )


def _read(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AnchorCalibration:
    from .anchors_calibration import AnchorCalibration, HostIdentity, ScorePoint

    cells = header["cells"]
    check_keys(header["host"], {"layers", "dtype"}, "the host of the calibration")
    if cells is not None:
        check_keys(cells, {"rows"}, "the cells of the calibration")
    layers = tuple((str(n), int(h), int(c), int(o)) for n, h, c, o in header["host"]["layers"])
    return AnchorCalibration(
        **{n: header[n] for n in _FIELDS},
        host=HostIdentity(
            layers, tensors["host.sketch"], str(header["host"]["dtype"]), tensors["host.probe"]
        ),
        plans=tuple(_read_plan(i, entry, tensors) for i, entry in enumerate(header["plans"])),
        scores=tuple(ScorePoint(**s) for s in header["scores"]),
        decoders=Decoders(
            _part(SlotDecoder, "slots", tensors) if header["has_slots"] else None,
            None if cells is None else _part(CellDecoder, "cells", tensors, rows=cells["rows"]),
            _part(RowMove, "move", tensors)
            if any(p["release"] == "mixed" for p in header["plans"])
            else None,
        ),
    )
