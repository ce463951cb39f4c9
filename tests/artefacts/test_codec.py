"""One codec for all kinds: a kind that it has never seen is written and read by its two tables, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_dp_xattn.artefacts import CardOptions
from hf_dp_xattn.artefacts.card import Parts, render
from hf_dp_xattn.artefacts.checks import Checks
from hf_dp_xattn.artefacts.codec import Codec, Encoded, Tensors
from hf_dp_xattn.artefacts.documents import write_files
from hf_dp_xattn.errors import ConfigError, LedgerError

from ..sealed import write_sealed

CHECKS = Checks("box", LedgerError, "pack again")
BOX = Codec(CHECKS, "box", "box/2", older=("box/1",))


@dataclass(frozen=True, eq=False)
class Box(Encoded):
    WORD = CHECKS.word
    CODEC = BOX
    KEYS = frozenset({"kind", "label"})
    KIND = "box"

    label: str
    lid: torch.Tensor

    def header(self) -> dict[str, Any]:
        return {"kind": "box", "label": self.label}

    def tensors(self) -> Tensors:
        return {"lid": self.lid}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> Box:
        if header["label"] == "planted":
            raise ConfigError("of another class")
        return cls(header["label"], tensors["lid"])

    def verify(self) -> None:
        CHECKS.sizes().fit("lid", self.lid, "a", "a")

    def card(self, options: CardOptions) -> ModelCard:
        return render(Parts("Box", "A box.", "open(box)", "None.", ["all"], [], ""), options)


def saved(folder: Path, **changes: Any) -> Path:
    """A box on disk, its JSON changed and sealed anew."""
    Box("tea", torch.eye(2)).save_pretrained(folder)
    if changes:
        write_sealed(folder / "box.json", {**BOX.read_document(folder), **changes})
    return folder


def test_there_and_back(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert {p.name for p in folder.iterdir()} == {"box.json", "box.safetensors", "README.md"}
    box = Box.load(folder)
    assert box.label == "tea" and torch.equal(box.lid, torch.eye(2))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    box.save_pretrained(folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert load_file(folder / "box.safetensors").keys() == {"lid"}


def test_an_older_schema_that_is_read(tmp_path: Path) -> None:
    assert Box.load(saved(tmp_path, schema="box/1")).label == "tea"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": "box/3"}, "box in .* has schema 'box/3', this package reads 'box/2': pack again"),
        ({"schema": None}, "has schema None"),
        ({"kind": "crate"}, "of kind 'crate', expected 'box'"),
        ({"more": 1}, r"unknown or missing keys in box\.json: \['more'\]"),
        ({"tensors_sha256": "0" * 64}, r"does not have the checksum that box\.json states"),
        ({"label": "planted"}, r"incomplete or damaged \(ConfigError: of another class\)"),
    ],
)
def test_what_the_json_cannot_say(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=said):
        Box.load(saved(tmp_path, **changes))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lid": torch.eye(2), "more": torch.ones(1)}, "unknown tensors: more"),
        ({"more": torch.ones(1)}, "KeyError"),
        ({"lid": torch.ones(2, 3)}, r"lid has shape \[2, 3\]"),
        ({"lid": torch.full((2, 2), torch.nan)}, "NaN"),
    ],
)
def test_tensors_that_do_not_fit(tensors: Tensors, said: str, tmp_path: Path) -> None:
    write_files(tmp_path, BOX.encode({"kind": "box", "label": "tea"}, tensors))
    with pytest.raises(LedgerError, match=said):
        Box.load(tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "box.safetensors").unlink()
    with pytest.raises(LedgerError, match=r"box in .* is incomplete"):
        Box.load(folder)
    (folder / "box.json").unlink()
    with pytest.raises(LedgerError, match=r"No box\.json"):
        Box.load(folder)
