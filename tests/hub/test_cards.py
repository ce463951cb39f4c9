"""Cards: valid metadata, the guarantee word for word, three lines that load; those in model_cards/ are what the package writes now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_dp_xattn as dpx
from hf_dp_xattn.artefacts.card import template

from ..hosts.anchor_calibrations import protect
from ..hosts_tiny import picture, tiny_sd
from .artefacts import CONFIG, KINDS, load, make

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("Load it", "What is promised", "What is public", "What is NOT covered", "What it is made of")


def card_of(kind: str, folder: Path, **options: Any) -> str:
    thing = make(kind)
    if kind == "config":
        from hf_dp_xattn.artefacts import card_options

        return str(thing.card(card_options(options)))
    thing.save_pretrained(folder, **options)
    return (folder / "README.md").read_text()


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("cards_tool", ROOT / "tools" / "cards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_and_sections(kind: str, tmp_path: Path) -> None:
    text = card_of(kind, tmp_path, license="mit", base_model="org/base", utility="| a | b |")
    card = ModelCard(text)
    values = card.data.to_dict()
    assert values["library_name"] == "hf_dp_xattn" and values["license"] == "mit"
    assert values["base_model"] == "org/base" and "differential-privacy" in values["tags"]
    assert all(f"\n## {title}\n" in text for title in SECTIONS)
    assert "\n## Measured utility\n" in text and "| a | b |" in text
    assert "None" not in card_of(kind, tmp_path, license=None).split("## What is promised")[0]
    assert ModelCard(card_of(kind, tmp_path)).data.license == "unknown"


@pytest.mark.parametrize("kind", KINDS)
def test_three_lines_load_it(kind: str, tmp_path: Path) -> None:
    """The code block of the card runs as it stands, but for the name of the folder."""
    code = re.search(r"```python\n(.*?)```", card_of(kind, tmp_path), re.DOTALL)
    assert code is not None
    make(kind).save_pretrained(tmp_path)
    lines = [x for x in code[1].replace("path/to/this/folder", str(tmp_path)).splitlines() if x]
    assert len(lines) <= 4
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    if kind.endswith("calibration"):
        lines = lines[:-1]  # protects the model that the calibration is for
    exec("\n".join(lines), {"pipe": pipe})


def test_a_release_states_its_guarantee_word_for_word(tmp_path: Path) -> None:
    pipe = tiny_sd()
    handle = protect(pipe, CONFIG, budget=dpx.Budget(10.0, 1e-5, "row", "replace_one"))
    handle.release("a")
    release = handle.release("a", fresh=True)
    release.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    report = handle.report()
    for item in (*report.public, *report.not_covered, *report.warnings):
        assert " ".join(item.split()) in text
    assert release.guarantees[0].sentence() in text
    assert (
        report.releases[-1]["charges"] == 2 and report.releases[-1]["spent_epsilon"] > 2.0
    )  # told here only
    row = next(x for x in text.splitlines() if x.startswith("| 1 |"))
    assert [c.strip() for c in row.split("|")][2:-1] == [
        "`kernel_sum`",
        "2",
        "1e-05",
        "`row`",
        "`replace_one`",
        "16",
    ]


def test_terms_travel_with_the_release(tmp_path: Path) -> None:
    """Loaded elsewhere, it still says what the host that made it said, and a second push gives the same card."""
    pipe = tiny_sd()
    release = protect(pipe, CONFIG).release("a")
    release.save_pretrained(tmp_path / "first")
    bare = tiny_sd()
    loaded = load("release", tmp_path / "first")
    assert loaded.terms == release.terms
    again = dpx.Release.from_pretrained(tmp_path / "first", host=bare)
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "README.md").read_text() == (tmp_path / "second" / "README.md").read_text()
    assert bool(picture(bare, **again.inputs()).isfinite().all())


def test_a_release_outlives_its_handle(tmp_path: Path) -> None:
    pipe = tiny_sd()
    release = protect(pipe, CONFIG).release("a")
    terms = release.terms
    dpx.unprotect(pipe)
    del pipe
    release.save_pretrained(tmp_path)
    assert load("release", tmp_path).terms == terms


def test_a_config_that_is_not_private_says_so(tmp_path: Path) -> None:
    text = str(CONFIG.replace(mechanism="none").card({}))
    assert "NOT PRIVATE" in text and "differentially private when" not in text


@pytest.mark.parametrize("name", ["/home/me/secret-project/model", "models/mine", "one", None])
def test_local_names_of_models_are_not_told(name: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd()
    pipe.unet.register_to_config(_name_or_path=name)
    release = protect(pipe, CONFIG).release("a")
    assert release.terms.base_model is None
    release.save_pretrained(tmp_path / "r")
    for file in (tmp_path / "r").iterdir():
        assert name is None or len(name) < 4 or name.encode() not in file.read_bytes()


def test_the_hub_id_of_the_model_is_told(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.unet.register_to_config(_name_or_path="org/tiny")
    release = protect(pipe, CONFIG).release("a")
    release.save_pretrained(tmp_path)
    assert ModelCard((tmp_path / "README.md").read_text()).data.base_model == "org/tiny"


def test_shipped_cards_are_what_the_package_writes() -> None:
    """`python tools/cards.py` writes them anew."""
    built = tool().cards()
    assert len(built) == 3
    for name, text in built.items():
        assert (ROOT / "model_cards" / name).read_text() == text, name
    assert (ROOT / "model_cards" / "template.md").read_text() == template()


@pytest.mark.parametrize("name", [p.name for p in sorted((ROOT / "model_cards").glob("*.md"))])
def test_all_shipped_cards_have_valid_metadata(name: str) -> None:
    if name == "template.md":
        return
    values = ModelCard((ROOT / "model_cards" / name).read_text()).data.to_dict()
    assert values["license"] and values["library_name"] and values["tags"]
