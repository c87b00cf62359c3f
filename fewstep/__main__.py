"""The command ``fewstep``: ``fewstep progressive ...`` is ``python -m recipes.progressive ...``, from any folder.

fewstep                            list the commands
fewstep progressive --preset smoke
torchrun --nproc_per_node 2 --no-python fewstep progressive
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from recipes.common.cli import Completing, fail


def commands() -> dict[str, str]:
    """Return the recipes by name, each with the first line of its docstring; none is imported."""
    folder = Path(importlib.util.find_spec("recipes").submodule_search_locations[0])  # type: ignore[union-attr, index]
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            found[path.stem] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
    return found


def main(argv: list[str] | None = None) -> None:
    known = commands()
    if "_ARGCOMPLETE" in os.environ:
        _complete(known)
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, known))
        print("usage: fewstep COMMAND [FLAGS]\n\n" + "\n".join(f"  {n.ljust(width)}  {line}" for n, line in known.items()))
        print("\nfewstep COMMAND --help explains a command.")
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4) or list(known)
        fail(f"unknown command {name!r}: nearest are {', '.join(near)}; fewstep --help lists all")
    _run(name, rest)


def _run(name: str, arguments: list[str]) -> None:
    """Run a recipe as ``python recipes/NAME.py`` does: it reads its flags before it imports the rest."""
    sys.argv[1:] = arguments
    runpy.run_path(str(importlib.util.find_spec(f"recipes.{name}").origin), run_name="__main__")  # type: ignore[union-attr]


def _complete(known: dict[str, str]) -> None:
    """Complete commands and flags in a shell that has argcomplete."""
    import argcomplete

    chosen = [word for word in os.environ.get("COMP_LINE", "").split()[1:2] if word in known]
    parser = argparse.ArgumentParser(prog="fewstep")
    commands_of = parser.add_subparsers()
    for name in known:
        parents = []
        if name in chosen:
            try:
                _run(name, [])
            except Completing as recipe:
                parents = [recipe.parser]
        commands_of.add_parser(name, parents=parents, add_help=False)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    main()
