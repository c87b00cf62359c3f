"""Imports run fewstep -> recipes -> {eval, teachers} -> distill, never back and never in a circle; heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "teachers", "eval", "recipes", "fewstep")
MAY_IMPORT = {
    "distill": {"distill"},
    "teachers": {"teachers", "distill"},
    "eval": {"eval", "teachers", "distill"},
    "recipes": set(PACKAGES) - {"fewstep"},
    "fewstep": set(PACKAGES),
}
FOREIGN = {
    "diffusers": {"teachers"},
    "torch_fidelity": {"eval"},
    "sklearn": {"teachers"},
    "matplotlib": {"eval"},
    "peft": {"teachers"},
}
FILES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, inside functions too; ``from package import module`` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path of imports that leads back to its beginning; empty where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_what_its_room_may(path):
    package = path.relative_to(ROOT).parts[0]
    found = {name.partition(".")[0] for name in imports(path)}
    assert found & set(PACKAGES) <= MAY_IMPORT[package]
    for library, rooms in FOREIGN.items():
        assert library not in found or package in rooms


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    assert circle(graph) == []
    graph["distill.schedule"] = {"teachers.load"}  # the test can fail
    assert circle(graph)[0] == circle(graph)[-1]


def test_recipes_holds_recipes_only_and_none_hides_a_package():
    """A script's folder comes first on sys.path: recipes/eval.py would hide the package eval, and so would a folder recipes/eval."""
    there = {p.stem for p in (ROOT / "recipes").iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")}
    assert not there & {*PACKAGES, "torch", "accelerate", "diffusers", "datasets", "safetensors", "numpy", "transformers"}
    for path in (ROOT / "recipes").glob("*.py"):
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert path.stem == "__init__" or {"main", "Config"} <= names, path


def test_distill_never_prints_or_parses():
    for path in (ROOT / "distill").glob("*.py"):
        assert "argparse" not in imports(path)
        calls = [
            n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "print" not in calls
