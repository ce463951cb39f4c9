"""What the survey finds of one class, and what its two halves share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import hf_dp_xattn as dpx

FOLDER = Path(__file__).parents[2] / "docs" / "hosts"
MECHANISMS = ("library", "anchors", "kernel_sum", "dptree", "none")
WORKS = "works"
NOT_RUN = "not run yet"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one class of hosts. text: which arguments of its call are private; none where it takes no text. how: mechanism to
    "works", or why it is refused, or what is wrong with it."""

    text: tuple[str, ...]
    how: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class NotBuilt(Exception):
    """No such host can be made or run here, protected or not."""


def reason(message: str) -> str:
    """Why something is refused, without what to do about it."""
    return message.split(". ")[0].split(" cannot be protected: ")[-1].split(" Nothing was patched")[0]


def codes(texts: list[str]) -> torch.Tensor:
    """Codes by the letters of a text: any public function will do, and no model runs for it."""
    return torch.tensor([[float(t.count(c)) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts])


def protect(mechanism: str, host: Any) -> Any:
    """The handle of a host that is protected by attention. Raises what `dpx.protect` does where it is refused."""
    options: dict[str, Any] = {"degree": 1, "projection_dim": 4} if mechanism == "kernel_sum" else {}
    chosen = dpx.DPXAttnConfig(unit="row", mechanism=mechanism, **options)
    return dpx.protect(host, chosen, allow_uncalibrated=True, ledger=dpx.Ledger())


def accepted(mechanism: str, host: Any) -> str:
    """Whether a host is taken for a mechanism on attention. Raises what `dpx.protect` does where it is refused."""
    try:
        protect(mechanism, host)
    except dpx.ConfigError as error:
        # for want of a calibration, which is asked for after the host was accepted
        if mechanism != "anchors" or "calibration" not in str(error):
            raise
    return WORKS
