"""The house's rule: nothing imports upward and nothing in a circle, not even for a type or inside a function; one name, one file."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = "hf_dp_xattn"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE
# from the bottom; a room may see its own level and those before it
LEVELS = (
    ("errors", "report", "known_mechanisms", "not_covered", "ranks", "records", "unquoted"),
    ("privacy", "artefacts"),
    ("config_card", "config"),
    ("mechanisms",),
    ("calibration",),
    ("hosts",),
    ("audit",),
    (PACKAGE,),  # the face: public names
    ("commands",),
    ("cli", "__main__"),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name; a package is the name of its folder."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the package, anywhere in its text: at its top, for types, in functions."""
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                source = ".".join(part for part in (base, node.module) if part)
                for alias in node.names:
                    target = f"{source}.{alias.name}"
                    if target in known or source in known:
                        graph[name].add(target if target in known else source)
    return graph


def level(module: str) -> int:
    parts = module.split(".")
    return LEVEL_OF[parts[1] if len(parts) > 1 else parts[0]]


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a, bs in graph.items() for b in sorted(bs) if level(b) > level(a)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan), and modules that import themselves."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(start: str) -> None:
        work = [(start, iter(sorted(graph[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(sorted(graph[other]))))
                    break
                if other in stack:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = stack[stack.index(node) :]
                    del stack[len(stack) - len(component) :]
                    if len(component) > 1 or node in graph[node]:
                        found.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return found


GRAPH = imports(modules(ROOT))


def test_every_room_has_a_level() -> None:
    rooms = {name.split(".")[1] for name in GRAPH if "." in name}
    assert rooms == set(LEVEL_OF) - {PACKAGE}


def test_nothing_imports_upward() -> None:
    assert upward(GRAPH) == []


def test_nothing_imports_in_a_circle() -> None:
    assert circles(GRAPH) == []


def test_a_file_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in modules(ROOT).values() if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} == set()


@pytest.mark.parametrize(
    ("files", "up", "circle"),
    [
        ({"errors.py": "from .config import C", "config.py": ""}, True, False),
        ({"errors.py": "if TYPE_CHECKING:\n    from .hosts.a import A", "hosts/a.py": ""}, True, False),
        ({"privacy/a.py": "def f():\n    from ..hosts import b", "hosts/b.py": ""}, True, False),
        ({"hosts/a.py": "from .b import B", "hosts/b.py": "def f():\n    from .a import A"}, False, True),
        ({"hosts/a.py": "from .b import B", "hosts/b.py": "from . import c", "hosts/c.py": "import hf_dp_xattn.hosts.a"}, False, True),
        ({"hosts/a.py": "from ..privacy.b import B", "privacy/b.py": "from ..errors import E", "errors.py": ""}, False, False),
    ],
    ids=["module", "type", "function", "circle-late", "circle-of-three", "clean"],
)  # fmt: skip
def test_what_breaks_the_rule_is_seen(tmp_path: Path, files: dict[str, str], up: bool, circle: bool) -> None:
    for name, text in files.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    graph = imports(modules(tmp_path / PACKAGE))
    assert (bool(upward(graph)), bool(circles(graph))) == (up, circle)
