"""The wheel: the package and nothing else, typed, with what it needs at run time; metadata that agree with each other."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_dp_xattn

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert hf_dp_xattn.__version__ == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text() or PROJECT["version"] == "0.1.0"


def test_citation_has_what_the_schema_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "2407.14717" in (ROOT / "CITATION.cff").read_text()


def test_extras() -> None:
    assert {"examples", "docs", "dev"} <= set(PROJECT["optional-dependencies"])


def test_the_changelog_names_the_schemas_that_are_read() -> None:
    from hf_dp_xattn.hosts import protection, storage

    text = (ROOT / "CHANGELOG.md").read_text()
    assert storage.SCHEMA in text and protection.SCHEMA in text


def test_every_import_of_the_package_is_declared() -> None:
    """What a file imports of the outside is a dependency (or the standard library, or optional and guarded)."""
    names = {re.split(r"[<>=!~ \[]", d)[0].replace("-", "_").lower() for d in PROJECT["dependencies"]}
    optional = {"matplotlib", "peft", "PIL", "psycopg", "datasets"}
    found = set()
    for file in (ROOT / "hf_dp_xattn").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) - names - optional - {"hf_dp_xattn"} <= set()


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the tree."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("hf_dp_xattn", "tests", "examples", "benchmarks", "tools", "model_cards"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names} == {"hf_dp_xattn", f"hf_dp_xattn-{PROJECT['version']}.dist-info"}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "hf_dp_xattn").rglob("*.py")}
    assert ours <= names and {"hf_dp_xattn/py.typed", "hf_dp_xattn/artefacts/template.md"} <= names
    assert not [n for n in names if n.endswith((".safetensors", ".pt", ".png"))]
    assert "License-Expression: Apache-2.0" in metadata and "Provides-Extra: docs" in metadata
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hf_dp_xattn\n"
        "assert hf_dp_xattn.__file__.startswith(sys.argv[1])\n"
        "print(hf_dp_xattn.DPXAttnConfig().card({}).data.library_name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "hf_dp_xattn", done.stderr
