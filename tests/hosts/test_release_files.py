"""Releases on disk."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ReleaseError
from hf_dp_xattn.hosts.storage import JSON_NAME, TENSORS_NAME, ReleaseFile
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..hosts_tiny import CHANNELS, picture, tiny_sd, tiny_unet
from ..sealed import write_sealed
from .anchor_calibrations import BOTH, protect

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture
def saved(pipe: Any, private: Any, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    handle = protect(pipe, private)
    release = handle.release(PROMPTS)
    return release.save_pretrained(tmp_path / "release"), picture(pipe, **release.inputs())


@pytest.mark.parametrize("features", ["taylor", "positive_random"])
@pytest.mark.parametrize("protected_already", [False, True])
def test_round_trip(features: str, protected_already: bool, pipe: Any, private: Any, tmp_path: Path) -> None:
    """Another process, another handle: the same pictures, the same guarantee, no charge."""
    config = private.replace(features=features, num_features=16)
    with protect(pipe, config) as handle:
        release = handle.release(PROMPTS)
        image = picture(pipe, **release.inputs(prompt="ink"))
        release.save_pretrained(tmp_path)
    other = tiny_sd()
    if protected_already:
        protect(other, config.replace(epsilon=1.0))
    charged = handle.ledger.entries()
    loaded = dpx.Release.from_pretrained(tmp_path, host=other)
    assert loaded.config == config and loaded.guarantees == release.guarantees
    assert torch.equal(image, picture(other, **loaded.inputs(prompt="ink")))
    handle = protect(other, config.replace(epsilon=1.0) if protected_already else config)
    entries = handle.report().releases
    assert [e["name"] for e in entries] == ["loaded", "loaded"] and entries[0]["epsilon"] == config.epsilon
    assert handle.ledger.entries() == (charged if protected_already else ())
    assert "as charged where it was made" in str(handle.report())


@BOTH
def test_a_loaded_release_that_is_not_kept(saved: tuple[Path, torch.Tensor]) -> None:
    other = tiny_sd()
    assert torch.equal(saved[1], picture(other, **dpx.Release.from_pretrained(saved[0], host=other).inputs()))


@BOTH
def test_json_states_the_guarantee_and_no_name(saved: tuple[Path, torch.Tensor]) -> None:
    document = json.loads((saved[0] / JSON_NAME).read_text())
    entry = document["contexts"][0]
    assert entry["guarantee"]["epsilon"] == 8.0 and entry["guarantee"]["is_private"]
    assert "differentially private" in entry["guarantee_text"]
    assert set(document) == {"schema", "config", "host", "contexts", "tensors_sha256", "sha256"}
    known = {"rows", "kind", "guarantee", "guarantee_text", "structures", "fingerprint"}
    assert set(entry) == known
    assert document["host"]["host"] == "UNet2DConditionModel" and document["host"]["base_model"] is None


@BOTH
def test_what_older_releases_told_is_dropped(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """Schema 2 stated how often each context was charged: whether a document had been released before."""
    told = {"number": 3, "epsilon": 17.25}
    edit_context(saved[0], lambda entry: entry.update(charges=told))
    edit(saved[0], schema="hf_dp_xattn.release/2")
    other = tiny_sd()
    loaded = dpx.Release.from_pretrained(saved[0], host=other)
    assert torch.equal(saved[1], picture(other, **loaded.inputs()))
    ReleaseFile.load(saved[0]).save_pretrained(str(tmp_path / "file"))
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("file", "again"):
        texts = (tmp_path / folder / JSON_NAME).read_text() + (tmp_path / folder / "README.md").read_text()
        assert "charges" not in texts and "17.25" not in texts and "release/3" in texts


def test_mechanism_none_is_never_written(pipe: Any, exact: Any, tmp_path: Path) -> None:
    release = protect(pipe, exact).release("a")
    with pytest.raises(ReleaseError, match="private rows"):
        release.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@BOTH
def test_noise_that_can_be_taken_off_is_never_written(pipe: Any, private: Any, tmp_path: Path) -> None:
    """Who knows the seed subtracts the noise."""
    release = protect(pipe, private, entropy=SeededEntropy(0)).release("a")
    with pytest.raises(ReleaseError, match="seeded"):
        release.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def read(folder: Path) -> Any:
    return json.loads((folder / JSON_NAME).read_text())


def write(folder: Path, document: Any, *, seal: bool = True) -> None:
    """seal: with the checksums that a forger would write, so that what follows them is reached."""
    if not seal:
        (folder / JSON_NAME).write_text(json.dumps(document))
        return
    blob = (folder / TENSORS_NAME).read_bytes()
    document["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    write_sealed(folder / JSON_NAME, document)


def edit(folder: Path, *, seal: bool = True, **changes: Any) -> None:
    write(folder, {**read(folder), **changes}, seal=seal)


def edit_context(folder: Path, change: Callable[[Any], Any]) -> None:
    document = read(folder)
    change(document["contexts"][0])
    write(folder, document)


def drop(folder: Path, key: str) -> None:
    document = read(folder)
    del document[key]
    write(folder, document)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)
    edit(folder)


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def swap_features(folder: Path) -> None:
    def change(entry: Any) -> None:
        if entry["structures"]:
            entry["structures"][0]["features"] = {"kind": "unheard of"}
        else:
            entry["kind"] = "unheard of"

    edit_context(folder, change)


def main_tensor(tensors: dict[str, torch.Tensor]) -> str:
    return "0.0.sums" if "0.0.sums" in tensors else "0.context.rows"


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = main_tensor(tensors)
    tensors[name] = tensors[name][..., :-1].contiguous()


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[main_tensor(tensors)].view(-1)[0] = torch.nan


def claim(**changes: Any) -> Any:
    return lambda f: edit_context(f, lambda entry: entry["guarantee"].update(changes))


def claim_in_words_too(**changes: Any) -> Any:
    def change(entry: Any) -> None:
        entry["guarantee"].update(changes)
        entry["guarantee_text"] = dpx.Guarantee.from_dict(entry["guarantee"]).sentence()

    return lambda f: edit_context(f, change)


DAMAGE: dict[str, Any] = {
    "a flipped bit": lambda f: flip(f / TENSORS_NAME, -5),
    "a flipped header": lambda f: flip(f / TENSORS_NAME, 3),
    "truncated tensors": lambda f: truncate(f / TENSORS_NAME, 100),
    "empty tensors": lambda f: truncate(f / TENSORS_NAME, 0),
    "no tensors": lambda f: (f / TENSORS_NAME).unlink(),
    "truncated JSON": lambda f: truncate(f / JSON_NAME, 200),
    "no JSON": lambda f: (f / JSON_NAME).unlink(),
    "a JSON list": lambda f: (f / JSON_NAME).write_text("[]"),
    "binary JSON": lambda f: (f / JSON_NAME).write_bytes(b"\xff\xfe\x00"),
    "a key twice": lambda f: (f / JSON_NAME).write_text(
        (f / JSON_NAME).read_text().replace('"config"', '"schema": "x", "config"', 1)
    ),
    "NaN": lambda f: (f / JSON_NAME).write_text(
        (f / JSON_NAME).read_text().replace('"rows": ', '"rows": NaN', 1)
    ),
    "an edited JSON": lambda f: edit(f, seal=False, tensors_sha256="0" * 64),
    "another epsilon": lambda f: (f / JSON_NAME).write_text(
        (f / JSON_NAME).read_text().replace('"epsilon": 8.0', '"epsilon": 0.1')
    ),
    "a newer schema": lambda f: edit(f, schema="hf_dp_xattn.release/4"),
    "an older schema": lambda f: edit(f, schema="hf_dp_xattn.release/1"),
    "an unknown key": lambda f: edit(f, relation="loose"),
    "a missing key": lambda f: drop(f, "host"),
    "no contexts": lambda f: edit(f, contexts=None),
    "empty contexts": lambda f: edit(f, contexts=[]),
    "half a context": lambda f: edit(f, contexts=[{}]),
    "a config of a newer version": lambda f: edit(f, config={"schema_version": 99}),
    "a config with a key left out": lambda f: edit(
        f, config={k: v for k, v in read(f)["config"].items() if k != "unit"}
    ),
    "other features": swap_features,
    "a pickle": lambda f: (f / TENSORS_NAME).write_bytes(pickle.dumps({"a": 1})),
    "a sealed pickle": lambda f: ((f / TENSORS_NAME).write_bytes(pickle.dumps({"a": 1})), edit(f)),
    "another shape": lambda f: edit_tensors(f, reshape),
    "NaN in a tensor": lambda f: edit_tensors(f, spoil),
    "an unknown tensor": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    "a missing tensor": lambda f: edit_tensors(f, lambda t: t.pop("0.public_rows")),
    "no rows": lambda f: edit_context(f, lambda entry: entry.update(rows=0)),
    "charges, which are not published": lambda f: edit_context(f, lambda entry: entry.update(charges={})),
    "words that promise more": claim(epsilon=16.0),
    "a negative epsilon": claim(epsilon=-1.0),
    "a promise without noise": claim(private_noise=False),
    "an unknown unit": claim(unit="word"),
    "a smaller epsilon than the config's": claim_in_words_too(epsilon=1e-9),
    "another delta than the config's": claim_in_words_too(delta=0.0),
    "another unit than the config's": claim_in_words_too(unit="context"),
    "another relation than the config's": claim_in_words_too(neighboring="add_or_remove_one"),
    "another mechanism than the config's": claim_in_words_too(mechanism="dptree"),
    "more rows than a release has": lambda f: edit_context(f, lambda entry: entry.update(rows=10**13)),
    "an unknown promise": claim(quantum=True),
}


@BOTH
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, saved: tuple[Path, torch.Tensor]) -> None:
    DAMAGE[name](saved[0])
    other = tiny_sd()
    with pytest.raises(ReleaseError):
        dpx.Release.from_pretrained(saved[0], host=other)
    assert "encode_prompt" not in vars(other)  # and the host was left alone


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError):
        dpx.Release.from_pretrained(tmp_path / "nowhere" / "at" / "all", host=tiny_sd())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReleaseError, match="incomplete"):
        dpx.Release.from_pretrained(tmp_path / "empty", host=tiny_sd())


@BOTH
@pytest.mark.parametrize("other", ["weights", "shape"])
def test_another_model(other: str, saved: tuple[Path, torch.Tensor]) -> None:
    unet = tiny_unet(1) if other == "weights" else tiny_unet(layers_per_block=2)
    pipe = tiny_sd(unet=unet)
    with pytest.raises(ReleaseError, match="weights" if other == "weights" else "shapes"):
        dpx.Release.from_pretrained(saved[0], host=pipe)
    assert "encode_prompt" not in vars(pipe)


@BOTH
def test_a_loaded_release_and_a_new_one_in_one_batch(saved: tuple[Path, torch.Tensor], private: Any) -> None:
    pipe = tiny_sd()
    handle = protect(pipe, private)
    loaded = dpx.Release.from_pretrained(saved[0], host=pipe)
    both = dpx.Release([*loaded.contexts, *handle.release("third").contexts], private, handle)
    assert bool(picture(pipe, **both.inputs()).isfinite().all())


@BOTH
def test_a_release_for_a_bare_unet_serves_its_pipeline(private: Any, tmp_path: Path) -> None:
    with protect(tiny_unet(), private) as handle:
        handle.release(torch.randn(16, CHANNELS)).save_pretrained(tmp_path)
    pipe = tiny_sd()
    assert bool(picture(pipe, **dpx.Release.from_pretrained(tmp_path, host=pipe).inputs()).isfinite().all())
