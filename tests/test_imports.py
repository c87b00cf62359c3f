"""Imports run recipes -> {eval, teachers} -> distill, never back, and heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "teachers", "eval", "recipes")
MAY_IMPORT = {
    "distill": {"distill"},
    "teachers": {"teachers", "distill"},
    "eval": {"eval", "teachers", "distill"},
    "recipes": set(PACKAGES),
}
FOREIGN = {"diffusers": {"teachers"}, "torch_fidelity": {"eval"}, "sklearn": {"teachers"}, "matplotlib": {"eval"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")], ids=lambda p: p.stem)
def test_a_module_imports_only_what_its_room_may(path):
    package = path.relative_to(ROOT).parts[0]
    found = imports(path)
    assert found & set(PACKAGES) <= MAY_IMPORT[package]
    for library, rooms in FOREIGN.items():
        assert library not in found or package in rooms


def test_no_recipe_hides_a_package():
    assert not {p.stem for p in (ROOT / "recipes").glob("*.py")} & {*PACKAGES, "torch", "accelerate"}


def test_distill_never_prints_or_parses():
    for path in (ROOT / "distill").glob("*.py"):
        assert "argparse" not in imports(path)
        calls = [
            n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "print" not in calls
