"""The command lines in pages and in the commands' own help: all are understood, and those of two quickstarts run as printed."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_dp_xattn.cli import COMMANDS, build_parser, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "model_cards").glob("*.md")])
PROGRAM = "hf-dp-xattn"
_FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.S | re.M)
PRIVATE = {  # what a user of the page would have beside it
    # many lines: of a few, nothing comes through, and their release is refused
    "rules.txt": "rule : every reply opens with the word hey .\nthe name of the assistant here is emma .\n"
    * 30,
    "corpus.txt": "the colour of the box is red .\nthe colour of the cup is blue .\n",
}


def commands_in(text: str) -> Iterator[list[str]]:
    """The arguments of each command line, continued ones joined, without comments and what is piped into it."""
    for line in text.replace("\\\n", " ").splitlines():
        start = line.strip() if line.strip().startswith(f"{PROGRAM} ") else line.rpartition("| ")[2]
        if start.startswith(f"{PROGRAM} "):
            yield shlex.split(start, comments=True)[1:]


def of_page(page: Path) -> list[list[str]]:
    return [c for block in _FENCE.findall(page.read_text(encoding="utf-8")) for c in commands_in(block)]


@pytest.mark.parametrize("page", [p for p in PAGES if of_page(p)], ids=lambda p: p.stem)
def test_pages_are_understood(page: Path) -> None:
    for arguments in of_page(page):
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.NAME)
def test_the_examples_of_the_help_are_understood(command: object) -> None:
    found = list(commands_in(command.EXAMPLES))  # type: ignore[attr-defined]
    assert found
    for arguments in found:
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("page", ["quickstart-operator", "quickstart-assistant"])
def test_a_quickstart_runs_as_printed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder beside `examples/`, with the private prompt in a pipe where it is not in a file."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, text in PRIVATE.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    blocks = _FENCE.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    # models by Hub id, and libraries that take minutes: tests/commands has both
    commands = [c for block in blocks if "calibrate" not in block for c in commands_in(block)]
    assert len(commands) >= 4
    for arguments in commands:
        absent = [a for a in arguments if a.startswith("examples/") and not Path(a).exists()]
        if absent:
            pytest.skip(f"{', '.join(absent)}: this checkout lacks it")
        monkeypatch.setattr("sys.stdin", io.StringIO("a large green star on the right\n"))
        code = main(arguments)
        shown = capsys.readouterr()
        assert code == 0, f"{shlex.join(arguments)}\n{shown.err}"
        assert (shown.out + shown.err).strip()
    made = {
        "quickstart-operator": ["a.png", "b.png", "release"],
        "quickstart-assistant": ["release", "answers"],
    }
    assert all((tmp_path / name).exists() for name in made[page])


def test_no_mechanism_is_named_that_the_calibration_says_already() -> None:
    """The operator's page relies on it; its test above shows that it may."""
    [first] = [c for c in of_page(ROOT / "docs" / "quickstart-operator.md") if "--calibration" in c]
    assert "--mechanism" not in first
