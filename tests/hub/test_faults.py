"""What goes wrong on the way to the Hub and back is a clear error of ours, and nothing is half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import DPXAttnError
from hf_dp_xattn.hosts.protect import handle_of

from ..hosts.anchor_calibrations import protect
from ..hosts_tiny import tiny_sd
from .artefacts import CONFIG, KINDS, content, files, load, make
from .server import TOKEN, FakeHub


@pytest.mark.parametrize("status", [400, 403, 500, 503])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_an_upload_that_breaks(kind: str, status: int, hub: FakeHub) -> None:
    thing = make(kind)
    thing.push_to_hub("me/thing")
    before = dict(hub.repos["me/thing"].branches)
    hub.fail_commit = status
    with pytest.raises(dpx.HubError, match=f"HTTP {status}") as caught:
        make(kind).push_to_hub("me/thing")
    assert TOKEN not in str(caught.value) and caught.value.__cause__ is None
    assert hub.repos["me/thing"].branches == before
    assert content(kind, load(kind, "me/thing")) == content(kind, thing)


def test_an_upload_without_rights(hub: FakeHub) -> None:
    with pytest.raises(dpx.HubError, match="HTTP 401"):
        CONFIG.push_to_hub("me/thing", token="hf_" + "y" * 34)
    assert hub.repos == {}


def test_no_server() -> None:
    with pytest.raises(dpx.HubError, match="upload failed"):
        CONFIG.push_to_hub("me/thing")  # the tests run offline
    with pytest.raises(dpx.ConfigError, match="could not be read from the Hub"):
        dpx.DPXAttnConfig.from_pretrained("me/thing")


@pytest.mark.parametrize("fault", ["truncate", "cut"])
@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in KINDS for n in sorted(files(k)) if n.startswith("dp_xattn")]
)
def test_a_download_that_arrives_short(kind: str, name: str, fault: str, hub: FakeHub) -> None:
    """truncate: a server that sends half a file and says so; only our checksums and strict JSON can tell. cut: the connection breaks."""
    thing = make(kind)
    thing.push_to_hub("me/thing")
    setattr(hub, fault, name)
    expected = "damaged" if fault == "truncate" else "could not be read"
    with pytest.raises(DPXAttnError, match=expected):
        load(kind, "me/thing")
    if fault == "cut":
        setattr(hub, fault, None)  # huggingface_hub threw the part away: the next call gets it all
        assert content(kind, load(kind, "me/thing")) == content(kind, thing)


def test_a_host_is_left_alone_when_its_release_is_not_whole(hub: FakeHub) -> None:
    make("release").push_to_hub("me/release")
    hub.truncate = "dp_xattn_release.safetensors"
    pipe = tiny_sd()
    with pytest.raises(dpx.ReleaseError):
        dpx.Release.from_pretrained("me/release", host=pipe)
    assert handle_of(pipe) is None and "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("name", ["me/nothing", "no such folder", "a/b/c/d", "..", "../..", "me/../you"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there(kind: str, name: str, hub: FakeHub) -> None:
    with pytest.raises(DPXAttnError):
        load(kind, name)


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../../x", "/etc", "a\\..\\b", "c:/x"])
@pytest.mark.parametrize("kind", KINDS)
def test_subfolders_that_lead_out(kind: str, subfolder: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in (tmp_path / "x", "me/thing"):
        with pytest.raises(DPXAttnError, match="relative path"):
            load(kind, name, subfolder=subfolder)
    with pytest.raises(dpx.ConfigError, match="relative path"):
        make("config").push_to_hub("me/thing", subfolder=subfolder)


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_are_none(kind: str, hub: FakeHub, tmp_path: Path) -> None:
    thing = make(kind)
    with pytest.raises(dpx.ConfigError, match="revison"):
        load(kind, "me/thing", revison="v1")
    with pytest.raises(dpx.ConfigError, match="publik"):
        thing.push_to_hub("me/thing", publik=True)
    with pytest.raises(dpx.ConfigError, match="license"):
        thing.push_to_hub("me/thing", license="my own\nlicense")
    with pytest.raises(dpx.ConfigError, match="base_model"):
        thing.push_to_hub("me/thing", base_model="/home/me/model")
    thing.save_pretrained(tmp_path)
    with pytest.raises(DPXAttnError, match="no revisions"):
        load(kind, tmp_path, revision="v1")
    assert hub.repos == {}


@pytest.mark.parametrize("why", ["exact", "seeded"])
def test_what_is_not_private_is_not_pushed(why: str, hub: FakeHub) -> None:
    from hf_dp_xattn.privacy.bits import SeededEntropy

    arguments: dict[str, Any] = {"entropy": SeededEntropy(0)} if why == "seeded" else {}
    config = CONFIG.replace(mechanism="none") if why == "exact" else CONFIG
    release = protect(tiny_sd(), config, **arguments).release("a")
    with pytest.raises(dpx.ReleaseError, match="never written"):
        release.push_to_hub("me/thing")
    assert hub.repos == {} and hub.log == []


@pytest.mark.parametrize("name", [None, 3, ["a"]], ids=str)
@pytest.mark.parametrize("kind", [dpx.Calibration, dpx.DPXAttnConfig, dpx.Release], ids=lambda k: k.__name__)
def test_what_is_no_name_of_a_folder(kind: Any, name: Any) -> None:
    with pytest.raises(dpx.DPXAttnError, match="name of a folder"):
        kind.from_pretrained(name, **({"host": None} if kind is dpx.Release else {}))
