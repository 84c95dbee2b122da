"""The package's rooms: imports run down the floors, no two files share a name, and the size stays bounded."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import lirpa_fastwarmup as fw

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lirpa_fastwarmup"
FILES = sorted(PACKAGE.rglob("*.py"))
# A file may import its own floor and those below.
FLOORS = [
    {"version", "boxes", "distributed", "memory", "storage", "models"},
    {"attacks", "engine"},
    {"recipe", "verification", "inspection"},
    {"experiments"},
    {"cli", "__main__"},
]
LABORATORY = {"experiments", "cli", "__main__"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(name: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if name in rooms)


def imported(path: Path) -> set[str]:
    """The modules of this package that ``path`` imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE.name:
            for alias in node.names:
                inner = Path(ROOT, *node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE.name}
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path != PACKAGE / "__init__.py"], ids=str)
def test_imports_run_down(path):
    for name in imported(path):
        target = name.split(".")[1] if "." in name else ""
        if target:  # The package's face loads lazily, and is for the command line.
            assert floor_of(target) <= floor_of(room(path)), f"{path} imports {name}"


def test_no_import_is_circular():
    def module(path: Path) -> str:
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    arrows = {module(path): imported(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name in done:
            return
        for other in arrows.get(name, ()):
            if other != PACKAGE.name:
                visit(other, (*above, name))
        done.add(name)

    for name in arrows:
        visit(name, ())


def test_no_two_files_share_a_name():
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_type_checkers_see_the_names_that_load():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    stub = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert stub == set(fw.__all__)
    assert all(getattr(fw, name) is not None for name in fw.__all__)


def test_only_the_engine_room_knows_the_engine():
    for path in FILES:
        if room(path) != "engine" and path != PACKAGE / "__init__.py":
            assert "import auto_LiRPA" not in path.read_text(), path


def test_the_package_stays_small():
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert sum(lines.values()) <= 13_500
