"""Imports run one way: no arrow against the layers, no circle; lazy and type-only imports count, too."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import dcafy

LAYERS = (
    # ground
    ("version", "text", "amounts", "tables", "display", "plots", "errors", "fronts", "wording", "threads", "draws"),
    ("records", "disk"),
    ("zoos",),
    # words and material
    ("plan",),
    ("graph",),
    # path
    ("trace", "find"),
    ("link",),
    ("survey",),
    ("emit",),
    # on a model
    ("converted", "attention"),
    ("choices",),
    ("conversion",),
    ("images", "analysis"),
    ("checkpoint",),
    ("sources",),
    # doing
    ("training",),
    ("detection",),
    ("export",),
    ("runs",),
    # faces
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
"""The files and packages in ``dcafy``, the lowest first; those of one row may import one another."""

RANK = {name: number for number, row in enumerate(LAYERS) for name in row}

Edges = Mapping[str, Iterable[str]]


def edges(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, anywhere in it; names below ``dcafy``."""
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("dcafy."):
                assert not node.level, f"{path}: relative imports hide where a name is from"
                home = str(node.module)[len("dcafy.") :]
                named = (f"{home}.{alias.name}".lstrip(".") for alias in node.names)
                found[name] |= {inner if inner in modules else home for inner in named}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name[6:] for alias in node.names if alias.name.startswith("dcafy.")}
        # A package's own file imports what the package offers; that is no arrow of the modules in it.
        found[name] -= {"", name}
    return found


def against_the_layers(found: Edges) -> list[str]:
    """The arrows that point upwards."""
    rank = {name: RANK[name.split(".")[0]] for name in found}
    return [f"{name} -> {other}" for name, others in found.items() for other in others if rank[other] > rank[name]]


def circle(found: Edges) -> list[str]:
    """The files of one circle of imports; empty where there is none."""
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


FOUND = edges(Path(dcafy.__file__).parent)


def test_every_file_is_in_a_layer() -> None:
    assert {name.split(".")[0] for name in FOUND} == set(RANK)
    assert sum(map(len, FOUND.values())) > 300, "the imports are not read"


def test_imports_follow_the_layers() -> None:
    assert against_the_layers(FOUND) == []


def test_there_is_no_circle() -> None:
    assert circle(FOUND) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from dcafy.cli.app import app",
        "from dcafy.cli import app",
        "import dcafy.cli.app",
        "if TYPE_CHECKING:\n    from dcafy.cli.app import app",
        "def f():\n    from dcafy.cli.app import app",
    ],
)
def test_an_arrow_upwards_is_seen(statement: str, tmp_path: Path) -> None:
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "app.py").write_text("from dcafy.errors import DcafyError\n")
    (tmp_path / "errors.py").write_text(f"{statement}\n")
    found = edges(tmp_path)
    assert against_the_layers(found) == ["errors -> cli.app"]
    assert sorted(set(circle(found))) == ["cli.app", "errors"]
