"""A protected pipeline or model on disk: its folder restores it protected, and is an ordinary model to everybody else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import BartForConditionalGeneration

import hf_dp_xattn as dpx
from hf_dp_xattn.config import CONFIG_NAME
from hf_dp_xattn.hosts.protection import FOLDER, PROTECTION_NAME

from ..hosts_tiny import CHANNELS, close, picture, quiet, tiny_sd, tiny_unet
from ..sealed import write_sealed
from .anchor_calibrations import BOTH, protect
from .transformers.encoder_decoder import calibrations
from .transformers.encoder_decoder.tiny import documents, generate, tiny

PROMPT = "a red circle"


@pytest.fixture
def folder(pipe: Any, private: Any, tmp_path: Path) -> Path:
    budget = dpx.Budget(20.0, 1e-5, private.unit, private.neighboring)
    handle = protect(pipe, private, budget=budget)
    handle.release(PROMPT)
    pipe.save_pretrained(tmp_path)
    return tmp_path


@BOTH
def test_a_protected_pipeline_comes_back_protected(folder: Path, pipe: Any, private: Any) -> None:
    restored = quiet(dpx.from_pretrained(folder))
    before, after = dpx.handle_of(pipe), dpx.handle_of(restored)
    assert after is not None and type(restored).__mro__[1:] == type(pipe).__mro__[1:]  # each has a stand-in
    assert (after.config, after.budget) == (before.config, before.budget)
    assert (after.calibration is None) == (before.calibration is None)
    picture(restored, PROMPT)
    assert len(after.report().releases) == 1  # private, and charged to the new ledger
    with pytest.raises(dpx.ProtectionLostError):
        restored.unet(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 16, 32))


@BOTH
def test_releases_are_drawn_alike(folder: Path, pipe: Any, private: Any, tmp_path: Path) -> None:
    release = protect(pipe, private).release(PROMPT)
    release.save_pretrained(tmp_path / "release")
    restored = quiet(dpx.from_pretrained(folder))
    loaded = dpx.Release.from_pretrained(tmp_path / "release", host=restored)
    drawn = picture(restored, **loaded.inputs())
    assert close(drawn, picture(pipe, **release.inputs()))
    handle = dpx.handle_of(restored)
    assert handle is not None
    other = handle.release("a blue square")
    assert not close(drawn, picture(restored, **other.inputs()))


@BOTH
def test_others_load_the_plain_pipeline(folder: Path, private: Any) -> None:
    plain = quiet(DiffusionPipeline.from_pretrained(folder))
    assert dpx.handle_of(plain) is None
    assert torch.equal(picture(plain, PROMPT), picture(tiny_sd(), PROMPT))


@pytest.mark.slow
def test_it_loads_where_this_package_is_not_installed(pipe: Any, private: Any, tmp_path: Path) -> None:
    protect(pipe, private)
    pipe.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['hf_dp_xattn'] = None\n"  # any import of it fails
        "from diffusers import DiffusionPipeline\n"
        f"print(type(DiffusionPipeline.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.split()[-1] == "StableDiffusionPipeline", done.stderr


def test_what_is_written(folder: Path) -> None:
    """Public settings only: no release, no ledger, and the config and the calibration as they are saved elsewhere."""
    assert {p.name for p in (folder / FOLDER).iterdir()} == {CONFIG_NAME, PROTECTION_NAME, "README.md"}
    assert dpx.DPXAttnConfig.from_pretrained(folder, subfolder=FOLDER).epsilon == 8.0
    assert not [p for p in folder.rglob("*") if "release" in p.name or "ledger" in p.name]
    assert "NOT covered" in (folder / FOLDER / "README.md").read_text()


def test_the_ledger_goes_on(folder: Path, tmp_path: Path, pipe: Any, private: Any) -> None:
    """One file counts before and after: a context that has spent its budget is refused in the restored pipeline."""
    path = tmp_path / "ledger.json"
    first = tiny_sd()
    protect(first, private, ledger=dpx.Ledger(path)).release(PROMPT)
    first.save_pretrained(tmp_path / "saved")
    restored = dpx.from_pretrained(tmp_path / "saved", ledger=dpx.Ledger(path))
    with pytest.raises(dpx.BudgetExceededError):
        picture(restored, PROMPT)
    picture(restored, "something else")


@pytest.mark.parametrize("private", ["anchors"], indirect=True)
def test_a_later_save_leaves_nothing_of_an_earlier_one(pipe: Any, private: Any, tmp_path: Path) -> None:
    with protect(pipe, private):
        pipe.save_pretrained(tmp_path)
    with dpx.protect(pipe, private.replace(mechanism="kernel_sum")):
        pipe.save_pretrained(tmp_path)
    handle = dpx.handle_of(dpx.from_pretrained(tmp_path))
    assert handle is not None and handle.calibration is None and handle.config.mechanism == "kernel_sum"


def test_unprotected_again_it_saves_as_before(pipe: Any, private: Any, tmp_path: Path) -> None:
    with protect(pipe, private):
        assert "save_pretrained" in vars(pipe)
    assert "save_pretrained" not in vars(pipe)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    with pytest.raises(dpx.ConfigError, match=r"dpx\.protect"):
        dpx.from_pretrained(tmp_path)


@BOTH
@pytest.mark.parametrize("part", ["bare", "of a pipeline"])
def test_unets(part: str, private: Any, tmp_path: Path) -> None:
    """A UNet takes its protection along, and comes back as it was: a bare one that only draws what was released."""
    pipe = tiny_sd()
    unet = pipe.unet
    with protect(unet if part == "bare" else pipe, private):
        unet.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(unet)
    assert (tmp_path / FOLDER / PROTECTION_NAME).is_file()
    restored = dpx.from_pretrained(tmp_path)
    handle = dpx.handle_of(restored)
    assert type(restored) is type(unet) and handle is not None and handle.config == private
    with pytest.raises(dpx.ProtectionLostError):
        restored(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 16, CHANNELS))
    release = handle.release(torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(0)))
    embeds = release.inputs()["encoder_hidden_states"]
    assert bool(restored(torch.zeros(1, 4, 8, 8), 0, embeds).sample.isfinite().all())
    plain = UNet2DConditionModel.from_pretrained(tmp_path)
    assert dpx.handle_of(plain) is None
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), unet.parameters(), strict=True))


def test_a_pipelines_protection_is_written_once(pipe: Any, private: Any, tmp_path: Path) -> None:
    with protect(pipe, private):
        pipe.save_pretrained(tmp_path / "pipe")
    assert [p.parent.parent.name for p in (tmp_path / "pipe").rglob(PROTECTION_NAME)] == ["pipe"]
    with protect(pipe.unet, private):  # the pipeline itself is plain, and its UNet is not
        pipe.save_pretrained(tmp_path / "plain")
    assert [p.parent.parent.name for p in (tmp_path / "plain").rglob(PROTECTION_NAME)] == ["unet"]
    assert dpx.handle_of(quiet(DiffusionPipeline.from_pretrained(tmp_path / "plain"))) is None
    assert dpx.handle_of(dpx.from_pretrained(tmp_path / "plain", subfolder="unet")) is not None


@BOTH
def test_models_of_transformers(private: Any, tmp_path: Path) -> None:
    model = tiny("bart")
    with calibrations.protect(model, private) as handle:
        release = handle.release(**documents("bart"))
        want = generate(model, release.inputs())
        model.save_pretrained(tmp_path / "model")
        release.save_pretrained(tmp_path / "release")
    assert "save_pretrained" not in vars(model)
    restored = dpx.from_pretrained(tmp_path / "model")
    assert dpx.handle_of(restored).config == private
    loaded = dpx.Release.from_pretrained(tmp_path / "release", host=restored)
    got = generate(restored, loaded.inputs())
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    plain = BartForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert dpx.handle_of(plain) is None
    a, b = (generate(m, documents("bart"))[1] for m in (plain, tiny("bart")))
    assert torch.equal(a, b)


def test_adapters_are_refused_before_anything_is_written(pipe: Any, private: Any, tmp_path: Path) -> None:
    """diffusers would write them in a form that it loads as random weights."""
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    protect(pipe, private)
    with pytest.raises(dpx.ConfigError, match="in unet"):
        pipe.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_saving_and_pushing_at_once_is_refused(pipe: Any, private: Any, tmp_path: Path) -> None:
    protect(pipe, private)
    with pytest.raises(dpx.ConfigError, match="push_to_hub"):
        pipe.save_pretrained(str(tmp_path / "x"), push_to_hub=True)
    assert not (tmp_path / "x").exists()


def test_serving_only(pipe: Any, tmp_path: Path) -> None:
    """A pipeline that was protected by loading a release has no calibration, and comes back as one that serves."""
    config = dpx.DPXAttnConfig(unit="row", mechanism="anchors", epsilon=8.0, delta=1e-5)
    with protect(pipe, config) as handle:
        handle.release(PROMPT).save_pretrained(tmp_path / "release")
    dpx.Release.from_pretrained(tmp_path / "release", host=pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    restored = dpx.from_pretrained(tmp_path / "pipe")
    with pytest.raises(dpx.ConfigError, match="calibration"):
        picture(restored, "new")
    loaded = dpx.Release.from_pretrained(tmp_path / "release", host=restored)
    assert bool(picture(restored, **loaded.inputs()).isfinite().all())


@pytest.mark.parametrize("option", ["trust_remote_code", "custom_pipeline", "use_safetensors"])
def test_pickles_and_foreign_code_are_refused(option: str, folder: Path) -> None:
    with pytest.raises(dpx.ConfigError, match=option):
        dpx.from_pretrained(folder, **{option: False})


def test_weights_in_a_pickle_are_not_read(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(tiny_unet().state_dict(), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        dpx.from_pretrained(folder)


def _edit(change: Callable[[dict[str, Any]], Any], *, again: bool = True) -> Callable[[Path], Any]:
    """again: with the checksum that a forger would write, so that what follows it is reached."""

    def apply(folder: Path) -> None:
        path = folder / PROTECTION_NAME
        values = json.loads(path.read_text())
        change(values)
        if again:
            write_sealed(path, values)
        else:
            path.write_text(json.dumps(values))

    return apply


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no protection": lambda f: (f / PROTECTION_NAME).unlink(),
    "truncated": lambda f: (f / PROTECTION_NAME).write_text((f / PROTECTION_NAME).read_text()[:40]),
    "another config": lambda f: (f / CONFIG_NAME).write_text(
        (f / CONFIG_NAME).read_text().replace("8.0", "80.0")
    ),
    "no config": lambda f: (f / CONFIG_NAME).unlink(),
    "another calibration": lambda f: (f / "dp_xattn_calibration.json").write_text("{}"),
    "no calibration": lambda f: (f / "dp_xattn_calibration.safetensors").unlink(),
    "a newer schema": _edit(lambda v: v.update(schema="hf_dp_xattn.protection/9")),
    "an unknown key": _edit(lambda v: v.update(loose=True)),
    "a larger budget": _edit(lambda v: v["budget"].update(epsilon=80.0), again=False),
    "no checksum": _edit(lambda v: v.pop("sha256"), again=False),
    "no budget": _edit(lambda v: v.pop("budget")),
    "an endless budget": _edit(lambda v: v["budget"].update(epsilon=1e999), again=False),
    "a budget of an odd unit": _edit(lambda v: v["budget"].update(unit=["row"])),
    "a budget that is none": _edit(lambda v: v.update(budget=8.0)),
    "files that are none": _edit(lambda v: v.update(files=5)),
    "a checksum that is none": _edit(lambda v: v["files"].update({CONFIG_NAME: None})),
    "words that are none": _edit(lambda v: v.update(not_covered=[1])),
    "a word for a list": _edit(lambda v: v.update(public="all")),
    "a class that is none": _edit(lambda v: v.update(host=1)),
    "a file elsewhere": _edit(lambda v: v["files"].update({"../../secret": "0" * 64})),
    "another pipeline": _edit(lambda v: v.update(pipeline="StableDiffusionImg2ImgPipeline")),
    "another model": _edit(lambda v: v.update(host="UNet3DConditionModel")),
    "no such model": _edit(lambda v: v.update(host="os", pipeline=None)),
}


@pytest.mark.parametrize("private", ["anchors"], indirect=True)
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_protections(name: str, folder: Path) -> None:
    DAMAGE[name](folder / FOLDER)
    with pytest.raises(dpx.ConfigError):
        dpx.from_pretrained(folder)


def test_another_pipelines_protection_is_refused(folder: Path, tmp_path: Path) -> None:
    """The calibration knows its text encoder: a protection that was moved to another model does not come up."""
    config = dpx.DPXAttnConfig(unit="row", mechanism="anchors", epsilon=8.0, delta=1e-5)
    pipe = tiny_sd(seed=3)
    protect(pipe, config)
    pipe.save_pretrained(tmp_path / "other")
    for file in (tmp_path / "other" / FOLDER).iterdir():
        (folder / FOLDER / file.name).write_bytes(file.read_bytes())
    with pytest.raises(dpx.ConfigError, match="another"):
        dpx.from_pretrained(folder)
