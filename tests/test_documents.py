"""The documents are true: their Python runs, their commands have the flags that they name, and the links of the site lead somewhere.

Blocks of a page share names, in their order. A block that begins with ``# slow`` runs in a slow test, which runs the whole page. One that
begins with ``# needs``, and those of README, use what is not here: they are compiled, and calls of fewstep are bound to its functions.
"""

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

import fewstep as fs
from fewstep.__main__ import commands
from recipes.common.cli import Completing

PAGES = sorted(str(page.relative_to(ROOT)) for page in (*ROOT.glob("docs/**/*.md"), ROOT / "README.md"))
FOREIGN = {  # flags of other programs
    "config_file", "cpu", "machine_rank", "main_process_ip", "num_processes", "nproc_per_node", "no-python", "strict", "help",
}  # fmt: skip


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE)


def kind(page, block):
    first = block.split("\n", 1)[0]
    return "shown" if page == "README.md" or first.startswith("# needs") else "slow" if first.startswith("# slow") else "fast"


def of_kind(*kinds):
    return [page for page in PAGES if any(kind(page, block) in kinds for block in blocks(page))]


def run(page, *kinds):
    """Run the blocks of these kinds in one namespace; a failure names the line of its block."""
    names: dict = {}
    for number, block in enumerate(blocks(page), 1):
        if kind(page, block) in kinds:
            exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", of_kind("fast"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("page", of_kind("slow"))
def test_the_python_of_a_page_that_trains_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, "fast", "slow")


@pytest.mark.parametrize("page", of_kind("shown"))
def test_python_that_is_only_shown_calls_fewstep_with_arguments_that_it_takes(page):
    for block in blocks(page):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.startswith("fs."):
                inspect.signature(getattr(fs, name[3:])).bind(*call.args, **{k.arg: k.value for k in call.keywords})


@cache
def flags(recipe):
    """Return {flag: its choices or None} of a recipe, which is not imported further than its flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_ARGCOMPLETE", "1")
        try:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        except Completing as known:
            return {word: action.choices for action in known.parser._actions for word in action.option_strings}
    raise AssertionError(f"recipes/{recipe}.py has no flags")


def lines_of(page):
    """Return the code of a page that may be a command: fenced and indented lines, continued ones as one, and code within the text."""
    joined = re.sub(r"\\\n\s*", " ", text(page))
    plain = re.sub(r"^```.*?^```$", "", joined, flags=re.DOTALL | re.MULTILINE)
    return [*joined.splitlines(), *re.findall(r"`([^`\n]+)`", plain)]


def commands_of(page):
    """Return (recipe, words after it) of each command: ``recipes/NAME.py ...`` or ``fewstep NAME ...`` with a flag."""
    found = []
    for line in lines_of(page):
        start = re.search(r"(?:recipes/(\w+)\.py|(?<![\w/])fewstep (\w+)) +([^`|]*--[^`|]*)", line)
        if start and (start[1] or start[2]) in commands():
            found.append((start[1] or start[2], re.split(r"\s{4,}|`", start[3])[0]))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_every_command_names_flags_and_choices_that_its_recipe_has(page):
    for recipe, rest in commands_of(page):
        words = shlex.split(rest.replace("'", ""), comments=True)
        for here, after in zip(words, [*words[1:], ""], strict=True):
            if here.startswith("--"):
                name = here.rstrip(".,;:)")
                assert name in flags(recipe), f"{page}: recipes/{recipe}.py has no {name}"
                choices = flags(recipe)[name]
                assert not choices or after.isupper() or after.rstrip(".,;:)") in map(str, choices), f"{page}: {name} {after}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_text_is_one_of_some_recipe(page):
    known = {word for recipe in commands() for word in flags(recipe)} | {f"--{name}" for name in FOREIGN}
    outside = re.sub(r"^.*python -m benchmarks.*$", "", text(page), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", outside)) <= known


def test_a_page_with_a_wrong_flag_a_wrong_choice_or_a_broken_block_is_found(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(
        "    python recipes/sample.py --no-such 1\n```python\nimport fewstep as fs\nfs.load(no=1)\n```\n"
    )
    assert flags("sample")  # kept, as recipes are looked for in ROOT
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert commands_of("page.md") == [("sample", "--no-such 1")] and len(blocks("page.md")) == 1
    with pytest.raises(TypeError):
        test_python_that_is_only_shown_calls_fewstep_with_arguments_that_it_takes("page.md")
    with pytest.raises(TypeError):
        run("page.md", "fast")
    with pytest.raises(AssertionError, match="no --no-such"):
        test_every_command_names_flags_and_choices_that_its_recipe_has("page.md")
    (tmp_path / "page.md").write_text("Draw with `fewstep sample --grid wrong`.\n")
    with pytest.raises(AssertionError, match="--grid wrong"):
        test_every_command_names_flags_and_choices_that_its_recipe_has("page.md")


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_fetches_nothing(tmp_path):
    if not all(map(importlib.util.find_spec, ("mkdocs", "mkdocstrings", "mkdocs_jupyter"))):
        pytest.skip("the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert 'data-md-component="source"' not in page.read_text(encoding="utf-8"), "a repo_url asks GitHub for its stars"
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link[^>]+rel=\"stylesheet\"[^>]+href=\"(https?:[^\"]+)",
                             page.read_text(encoding="utf-8"))  # fmt: skip
        assert not fetched, f"{page.name} fetches {fetched}"
