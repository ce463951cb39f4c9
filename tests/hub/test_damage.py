"""Whatever happens to a file, loading it gives the same thing or an error of ours, never a guess and never another exception."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_dp_xattn as dpx
from hf_dp_xattn.artefacts.documents import write_files
from hf_dp_xattn.calibration.kinds import load_calibration
from hf_dp_xattn.errors import DPXAttnError
from hf_dp_xattn.hosts.storage import ReleaseFile

from ..sealed import write_sealed
from .artefacts import KINDS, content, make

READERS: dict[str, Callable[[Path], Any]] = {
    "config": dpx.DPXAttnConfig.from_file,
    "calibration": load_calibration,
    "anchors calibration": load_calibration,
    "library": load_calibration,
    "release": ReleaseFile.load,
}
JSON = "dp_xattn_calibration.json"
TENSORS = "dp_xattn_calibration.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    out = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("original")
        make(kind).save_pretrained(folder)
        out[kind] = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}
    return out


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte(kind: str, originals: Any, tmp_path: Path, data: st.DataObject) -> None:
    """A release or calibration says the same or is refused: no number in it can change by a slip. A config, which people may edit, is
    valid or refused."""
    files = originals[kind]
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name])
    way = data.draw(st.sampled_from(["change", "drop", "insert", "cut"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255))
    if way == "change":
        raw[at] = value
    elif way == "drop":
        del raw[at]
    elif way == "insert":
        raw.insert(at, value)
    else:
        del raw[at:]
    write_files(tmp_path, {**files, name: bytes(raw)})
    try:
        loaded = READERS[kind](tmp_path)
    except DPXAttnError:
        return
    if kind != "config":
        write_files(tmp_path, files)
        assert content(kind, loaded) == content(kind, READERS[kind](tmp_path))


def edit(change: Callable[[dict[str, Any]], Any], *, again: bool = True) -> Callable[[Path], None]:
    """again: with the checksum that a forger would write, so that what follows it is reached."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / JSON).read_text())
        change(values)
        if again:
            write_sealed(folder / JSON, values)
        else:
            (folder / JSON).write_text(json.dumps(values))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / TENSORS)
        change(held)
        save_file(held, folder / TENSORS)
        digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        edit(lambda v: v.update(tensors_sha256=digest))(folder)

    return apply


def shorten(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda held: held.update({name: held[name][..., :-1].contiguous()})


def spoil(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda held: held.update({name: torch.full_like(held[name], torch.nan)})


BOTH: dict[str, Callable[[Path], None]] = {
    "an unknown key": edit(lambda v: v.update(extra=1)),
    "a missing key": edit(lambda v: v.pop("units")),
    "a newer schema": edit(lambda v: v.update(schema_version=99)),
    "no contexts": edit(lambda v: v.update(contexts=0)),
    "half a unit": edit(lambda v: v.update(units=0.5)),
    "an unknown key of a plan": edit(lambda v: v["plans"][0].update(extra=1)),
    "a missing key of a plan": edit(lambda v: v["plans"][0].pop("epsilon")),
    "an epsilon in words": edit(lambda v: v["plans"][0].update(epsilon="8")),
    "no epsilon": edit(lambda v: v["plans"][0].update(epsilon=0.0)),
    "an endless number": edit(lambda v: v["plans"][0].update(epsilon=10**400), again=False),
    "another epsilon": edit(lambda v: v["plans"][0].update(epsilon=9.0), again=False),
    "no checksum": edit(lambda v: v.pop("sha256"), again=False),
    "the older schema's name": edit(lambda v: v.update(schema_version=1), again=False),
    "a schema that is no number": edit(lambda v: v.update(schema_version=True)),
    "no schema": edit(lambda v: v.pop("schema_version")),
    "a plan less": edit(lambda v: v["plans"].pop()),
    "an unknown tensor": tensors(lambda held: held.update(extra=torch.zeros(1))),
    "a pickle": lambda folder: (folder / TENSORS).write_bytes(b"\x80\x04K\x01."),
}
ANCHORS: dict[str, Callable[[Path], None]] = {
    "another kind": edit(lambda v: v.update(kind="other")),
    "no plans": edit(lambda v: v.update(plans=[])),
    "an unknown unit": edit(lambda v: v.update(unit="word")),
    "an unknown relation": edit(lambda v: v.update(neighboring="loose")),
    "an unknown release": edit(lambda v: v["plans"][0].update(release="all")),
    "a share of everything": edit(lambda v: v["plans"][0].update(share_plus=1.0)),
    "other channels": edit(lambda v: v.update(channels=5)),
    "a code too short": tensors(shorten("plan.0.matrix")),
    "a head too short": tensors(shorten("plan.0.head.weight")),
    "slots too short": tensors(shorten("slots.slots")),
    "NaN in a map": tensors(spoil("plan.0.matrix")),
    "NaN in a decoder": tensors(spoil("slots.hidden")),
    "a probe of other channels": tensors(lambda held: held.update({"host.probe": torch.zeros(2, 3)})),
    "a missing tensor": tensors(lambda held: held.pop("plan.0.center")),
}
KERNEL_SUM: dict[str, Callable[[Path], None]] = {
    "an unknown setting": edit(lambda v: v["settings"].update(extra=1)),
    "a setting out of range": edit(lambda v: v["settings"].update(degree=9)),
    "no bound": edit(lambda v: v.update(clip_norm=0.0)),
    "another bound": edit(lambda v: v.update(clip_norm=v["clip_norm"] * 1.01), again=False),
    "a layer less": edit(lambda v: v["layers"].pop()),
    "a map too short": tensors(shorten("geometry.0.key_map")),
    "NaN in a centre": tensors(spoil("geometry.0.key_center")),
    "a basis too short": tensors(shorten("basis.0.analysis")),
    "a covariance too short": tensors(shorten("plan.0.cov_y")),
    "a missing tensor": tensors(lambda held: held.pop("geometry.1.key_range")),
}
CASES = [
    *(("calibration", name, damage) for name, damage in {**BOTH, **KERNEL_SUM}.items()),
    *(("anchors calibration", name, damage) for name, damage in {**BOTH, **ANCHORS}.items()),
]


@pytest.mark.parametrize(("kind", "name", "damage"), CASES, ids=[f"{k}-{n}" for k, n, _ in CASES])
def test_calibrations_whose_parts_do_not_fit(
    kind: str, name: str, damage: Callable[[Path], None], originals: Any, tmp_path: Path
) -> None:
    write_files(tmp_path, originals[kind])
    READERS[kind](tmp_path)
    damage(tmp_path)
    with pytest.raises(dpx.ConfigError):
        dpx.Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["calibration", "anchors calibration"])
def test_calibrations_of_schema_1_are_refused(kind: str, originals: Any, tmp_path: Path) -> None:
    """Its JSON had no checksum of its own, so that a changed digit would be believed."""
    write_files(tmp_path, originals[kind])
    values = json.loads((tmp_path / JSON).read_text())
    del values["sha256"]
    values |= {"schema_version": 1, "sha256": values.pop("tensors_sha256")}
    (tmp_path / JSON).write_text(json.dumps(values))
    for read in (READERS[kind], dpx.Calibration.from_pretrained):
        with pytest.raises(dpx.ConfigError, match="schema version 1, this package reads 2: calibrate again"):
            read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"epsilon": 8.0, "epsilon": 1.0}',
        '{"epsilon": NaN}',
        '{"epsilon": Infinity}',
        '{"epsilon": 1e999}',
        '{"epsilon": 100000000000000000000}',
        "[" * 10**5,
        "",
        "null",
    ],
    ids=["a key twice", "NaN", "Infinity", "1e999", "10^20", "too deep", "empty", "null"],
)
def test_json_that_is_ambiguous_or_none(text: str, originals: Any, tmp_path: Path) -> None:
    for kind, files in originals.items():
        name = next(n for n in files if n.endswith(".json"))
        write_files(tmp_path, {**files, name: text.encode()})
        with pytest.raises(DPXAttnError, match=r"JSON|schema"):
            READERS[kind](tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: Any) -> None:
    write_files(tmp_path, {"a": b"old"})

    def full(self: Path, data: bytes) -> int:
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_files(tmp_path, {"a": b"new"})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
