"""A command answers before it imports what takes seconds: help, wrong flags, and the completion of a shell."""

import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from fewstep.__main__ import commands

# what the answers must do without: torch, the libraries on top of it, and the larger ones beside it
HEAVY = (
    "torch", "accelerate", "diffusers", "transformers", "torch_fidelity", "torchvision", "safetensors", "sklearn", "scipy", "matplotlib",
    "PIL", "numpy", "pandas", "tqdm",
)  # fmt: skip
BLOCKED = f"""
import contextlib, io, json, os, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Blocker())

def answer(*command):
    sys.argv[1:], said = command[1:], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0, said.getvalue()
    return 0, said.getvalue()
"""


def blocked(code, **environment):
    """Run Python code that uses ``answer`` in a process where `HEAVY` cannot be imported. It prints JSON."""
    command = [sys.executable, "-c", BLOCKED + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_recipe_helps_and_refuses_wrong_flags_without_torch():
    """One process for all: it starts in a fraction of a second because the claim holds."""
    words = (["--help"], ["--help", "all"], ["--help", "nothing"], ["--no-such-flag"], ["--preset", "wrong"])
    code = f"print(json.dumps([[answer('recipes.' + n, *w) for w in {words!r}] for n in {sorted(commands())!r}]))"
    for name, answers in zip(sorted(commands()), blocked(code), strict=True):
        codes, (short, full, topic, unknown, preset) = zip(*answers, strict=True)
        assert codes == (0, 0, 2, 2, 2), (name, answers)
        assert f"usage: {name} [FLAGS]" in short and len(short) <= len(full) and "accepted are --help" in topic
        assert all(line.startswith("error: ") and line.count("\n") == 1 for line in (topic, unknown, preset))


def test_topics_values_out_of_bounds_and_the_list_of_commands_need_no_torch():
    code = """
print(json.dumps([answer(*line.split()) for line in (
    "recipes.progressive --help teacher", "recipes.evaluate --help data", "recipes.consistency --method ict --help all",
    "recipes.progressive --start-steps 0", "recipes.sample --grid wrong", "fewstep", "fewstep progressive --help", "fewstep progresive",
)]))"""
    teacher, data, ict, bound, grid, listed, helped, wrong = blocked(code)
    assert teacher[0] == data[0] == ict[0] == listed[0] == helped[0] == 0 and bound[0] == grid[0] == wrong[0] == 2
    assert "oracle:gaussian" in teacher[1] and "wds:PATTERN" in data[1] and "pseudo_huber)" in ict[1]
    assert "at least 2" in bound[1] and "karras" in grid[1] and "consistency" in listed[1]
    assert "usage: progressive" in helped[1] and "nearest are progressive" in wrong[1]


def test_a_shell_completes_the_flags_of_a_recipe_without_torch():
    pytest.importorskip("argcomplete")
    code = """
from fewstep import __main__ as command
from recipes.common.cli import Completing
try:
    command._run("progressive", [])
except Completing as recipe:
    print(json.dumps([word for action in recipe.parser._actions for word in action.option_strings]))
"""
    assert "--start-steps" in blocked(code, _ARGCOMPLETE="1")


def test_the_python_face_has_its_names_before_it_imports_them():
    code = """
import fewstep, teachers
print(json.dumps([*fewstep.__all__, *teachers.__all__, hasattr(fewstep, "nothing"), hasattr(teachers, "nothing")]))
"""
    *names, absent, none = blocked(code)
    assert {"distil", "Teacher", "load", "save"} <= set(names) and not absent and not none
    import fewstep
    import teachers

    for package in (fewstep, teachers):
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert fewstep.Teacher is fewstep.Model and fewstep.trust is teachers.trust


def cpu_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_a_few_times_what_python_and_argparse_take():
    """torch alone takes thirty times as much."""
    bare = min(cpu_seconds("-c", "import argparse, dataclasses") for _ in range(3))
    assert min(cpu_seconds("recipes/evaluate.py", "--help", "all") for _ in range(3)) < 10 * max(bare, 0.02)
