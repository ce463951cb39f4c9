"""All kinds go up to a Hub and come back: by name, revision and subfolder, and from the cache without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session

import hf_dp_xattn as dpx
from hf_dp_xattn.artefacts.card import MARKER

from ..hosts.anchor_calibrations import protect
from ..hosts.transformers.encoder_decoder.tiny import tiny
from ..hosts_tiny import close, picture, tiny_sd
from .artefacts import CONFIG, KINDS, content, drawn, files, load, make
from .server import FakeHub


@pytest.mark.parametrize("kind", KINDS)
def test_up_and_back(kind: str, hub: FakeHub) -> None:
    thing = make(kind)
    address = thing.push_to_hub("me/thing", license="apache-2.0", base_model="org/base")
    stored = hub.repos["me/thing"].files()
    assert address.startswith(hub.url) and set(stored) == files(kind)
    card = ModelCard(stored["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/base")
    assert card.data.library_name == "hf_dp_xattn" and "differential-privacy" in card.data.tags
    assert '"me/thing"' in card.text
    assert content(kind, load(kind, "me/thing")) == content(kind, thing)


def test_a_release_draws_the_same_picture(hub: FakeHub) -> None:
    pipe = tiny_sd()
    with dpx.protect(pipe, CONFIG) as handle:
        release = handle.release("a red circle")
        want = drawn(release, pipe)
        release.push_to_hub("me/release")
    other = tiny_sd()
    assert torch.equal(want, drawn(dpx.Release.from_pretrained("me/release", host=other), other))


@pytest.mark.parametrize("kind", KINDS)
def test_subfolders(kind: str, hub: FakeHub, tmp_path: Path) -> None:
    thing = make(kind)
    thing.push_to_hub("me/many", subfolder="a/b")
    assert set(hub.repos["me/many"].files()) == {f"a/b/{name}" for name in files(kind)}
    assert content(kind, load(kind, "me/many", subfolder="a/b")) == content(kind, thing)
    with pytest.raises(dpx.DPXAttnError, match="could not be read"):
        load(kind, "me/many")
    thing.save_pretrained(tmp_path / "a" / "b")
    assert content(kind, load(kind, tmp_path, subfolder="a/b")) == content(kind, thing)
    with pytest.raises(dpx.DPXAttnError):
        load(kind, tmp_path)


def test_revisions(hub: FakeHub) -> None:
    old, new = CONFIG, CONFIG.replace(epsilon=4.0)
    old.push_to_hub("me/config")
    first = hub.repos["me/config"].branches["main"]
    new.push_to_hub("me/config")
    new.replace(epsilon=9.0).push_to_hub("me/config", revision="loose")
    read = dpx.DPXAttnConfig.from_pretrained
    assert read("me/config") == read("me/config", revision="main") == new
    assert read("me/config", revision=first) == old
    assert read("me/config", revision="loose").epsilon == 9.0
    with pytest.raises(dpx.ConfigError, match="could not be read"):
        read("me/config", revision="nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_cache_without_a_network(kind: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = make(kind)
    thing.push_to_hub("me/thing")
    load(kind, "me/thing")
    hub.log.clear()
    assert content(kind, load(kind, "me/thing", local_files_only=True)) == content(kind, thing)
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert content(kind, load(kind, "me/thing")) == content(kind, thing)
    with pytest.raises(dpx.DPXAttnError, match="could not be read"):
        load(kind, "me/other")
    with pytest.raises(dpx.HubError, match="upload failed"):
        thing.push_to_hub("me/thing")


def test_a_cache_folder_of_ones_own(hub: FakeHub, tmp_path: Path) -> None:
    CONFIG.push_to_hub("me/config")
    assert dpx.DPXAttnConfig.from_pretrained("me/config", cache_dir=tmp_path / "mine") == CONFIG
    assert list((tmp_path / "mine").rglob("dp_xattn_config.json"))
    with pytest.raises(dpx.ConfigError):
        dpx.DPXAttnConfig.from_pretrained("me/config", local_files_only=True)


def test_all_files_come_from_one_commit(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone pushes between the two downloads: the second file still comes from the first one's commit."""
    import huggingface_hub

    first, second = make("release"), make("release")
    first.push_to_hub("me/release")
    original = huggingface_hub.hf_hub_download

    def download(*args: Any, **kwargs: Any) -> str:
        path = original(*args, **kwargs)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", original)
        second.push_to_hub("me/release")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert content("release", load("release", "me/release")) == content("release", first)
    assert content("release", load("release", "me/release")) == content("release", second)


def test_a_readme_of_somebody_else_stays(hub: FakeHub, tmp_path: Path) -> None:
    hub.repo("me/model").commit("main", {"README.md": b"# My model\n"})
    CONFIG.push_to_hub("me/model")
    assert hub.repos["me/model"].files()["README.md"] == b"# My model\n"
    (tmp_path / "README.md").write_text("# Mine\n")
    release = make("release")
    release.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").write_text(MARKER + "old -->")
    release.save_pretrained(tmp_path)
    assert "# Released private context" in (tmp_path / "README.md").read_text()


def test_an_own_card_is_written_anew(hub: FakeHub) -> None:
    CONFIG.push_to_hub("me/config")
    CONFIG.replace(epsilon=0.25).push_to_hub("me/config")
    assert "(0.25, 1e-05)-differentially private" in hub.repos["me/config"].files()["README.md"].decode()


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_a_protected_pipeline(mechanism: str, hub: FakeHub) -> None:
    """`pipe.push_to_hub` of diffusers takes the protection along, and one call restores it."""
    pipe = tiny_sd()
    handle = protect(pipe, CONFIG.replace(mechanism=mechanism, epsilon=8.0))
    handle.release("a red circle")
    pipe.push_to_hub("me/pipe")
    assert "dp_xattn/dp_xattn_protection.json" in hub.repos["me/pipe"].files()
    restored = dpx.from_pretrained("me/pipe")
    assert dpx.handle_of(restored).config == handle.config
    assert bool(picture(restored, "a blue star").isfinite().all())
    hub.log.clear()
    again = dpx.from_pretrained("me/pipe", local_files_only=True)
    assert dpx.handle_of(again).budget == handle.budget and hub.log == []
    with pytest.raises(dpx.ConfigError, match="could not be read"):
        dpx.from_pretrained("me/pipe", revision="nowhere")


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_a_protected_pipeline_in_a_subfolder(mechanism: str, hub: FakeHub, tmp_path: Path) -> None:
    """Of a repository that holds others, and of a folder; neither pickles nor code nor what stands beside it are downloaded."""
    config = CONFIG.replace(mechanism=mechanism, epsilon=8.0)
    pipe = tiny_sd()
    with protect(pipe, config) as handle:
        release = handle.release("a red circle")
        want = picture(pipe, **release.inputs())
        release.save_pretrained(tmp_path / "release")
        pipe.push_to_hub("me/many", subfolder="a/[1]")
        pipe.save_pretrained(tmp_path / "a" / "b")
    repo = hub.repos["me/many"]
    first = repo.branches["main"]
    stray = {"a/[1]/unet/x.bin": b"x", "a/[1]/pipeline.py": b"x", "a/1/x.json": b"{}", "x.json": b"{}"}
    repo.commit("main", {**repo.files(), **stray})
    other = tiny_sd(seed=3)
    with protect(other, config.replace(epsilon=4.0)):
        other.push_to_hub("me/many", subfolder="b")
    hub.log.clear()
    restored = dpx.from_pretrained("me/many", subfolder="a/[1]")
    asked = [unquote(path).rsplit("/", 1)[-1] for method, path in hub.log if "/resolve/" in path]
    assert "model_index.json" in asked and not {"x.bin", "pipeline.py", "x.json"} & set(asked)
    hub.log.clear()
    again = dpx.from_pretrained("me/many", subfolder="a/[1]", local_files_only=True)
    assert hub.log == []
    older = dpx.from_pretrained("me/many", subfolder="a/[1]", revision=first)
    local = dpx.from_pretrained(tmp_path, subfolder="a/b")
    for host in (restored, again, older, local):
        assert dpx.handle_of(host).config == config
        loaded = dpx.Release.from_pretrained(tmp_path / "release", host=host)
        assert close(picture(host, **loaded.inputs()), want)
    assert dpx.handle_of(dpx.from_pretrained("me/many", subfolder="b")).config.epsilon == 4.0
    for wrong in ({}, {"subfolder": "c"}, {"subfolder": "b", "revision": first}):
        with pytest.raises(dpx.ConfigError, match="could not be read"):
            dpx.from_pretrained("me/many", **wrong)


def test_a_bare_unet(hub: FakeHub) -> None:
    unet = tiny_sd().unet
    handle = dpx.protect(unet, CONFIG)
    unet.push_to_hub("me/unet")
    restored = dpx.from_pretrained("me/unet")
    assert type(restored) is type(unet) and dpx.handle_of(restored).config == handle.config


def test_a_protected_model(hub: FakeHub) -> None:
    """Likewise `model.push_to_hub` of transformers."""
    model = tiny("bart")
    handle = dpx.protect(model, CONFIG)
    model.push_to_hub("me/model")
    restored = dpx.from_pretrained("me/model")
    assert dpx.handle_of(restored).config == handle.config
    assert restored.state_dict().keys() == model.state_dict().keys()
