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


def test_the_digits_are_those_of_scikit_learn():
    """They are read from its file, because importing it takes longer than some training steps."""
    import torch
    from sklearn.datasets import load_digits

    from teachers.digits import digits

    known, (images, labels) = load_digits(), digits()
    assert torch.equal(images[:, 0], torch.tensor(known.images / 16 * 255).round().to(torch.uint8))
    assert torch.equal(labels, torch.tensor(known.target)) and images.is_contiguous()


def fresh(code):
    """Run Python code in a process of its own and return what it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_embedded_teacher_is_loaded_and_probed_without_libraries_that_it_does_not_use():
    code = """
import json, sys, teachers
from recipes.common.checks import check_denoiser
from recipes.data import sets
check_denoiser(teachers.load("digits"), sets.load("digits"), 0, False)
print(json.dumps([name for name in ("sklearn", "scipy.stats", "transformers.modeling_utils", "matplotlib", "pandas") if name in sys.modules]))
"""
    assert fresh(code) == []


@pytest.mark.slow
def test_packages_of_diffusers_whose_init_was_delayed_have_all_their_names_afterwards():
    code = """
import json, sys
{first}
import diffusers.models.unets as unets, diffusers.models.transformers as transformers
from diffusers import DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
assert transformers.DiTTransformer2DModel is DiTTransformer2DModel and unets.UNet2DModel is UNet2DModel
assert sys.modules["diffusers.models"].transformers is transformers
names = [sorted(n for n in vars(module) if not n.startswith("_")) for module in (unets, transformers)]
print(json.dumps([names, [c.__name__ for c in StableDiffusionPipeline.__mro__], UNet2DConditionModel.__module__]))
"""
    late = """
import teachers
teachers.load("digits")
assert "diffusers.models.unets.unet_2d_condition" not in sys.modules
"""
    assert fresh(code.format(first=late)) == fresh(code.format(first=""))


def test_a_delayed_package_runs_when_a_name_is_taken_and_a_missing_one_is_ignored(tmp_path, monkeypatch):
    from teachers.networks.late import delay

    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "inner" / "part.py").write_text("value = 1")
    (tmp_path / "outer" / "inner" / "__init__.py").write_text("from .part import value\nfrom . import part\nran = True")
    monkeypatch.syspath_prepend(tmp_path)
    delay("outer.inner")
    delay("outer.missing")
    from outer.inner.part import value  # type: ignore[import-not-found]

    inner = sys.modules["outer.inner"]
    assert value == 1 and "ran" not in vars(inner) and not hasattr(inner, "__wrapped__") and "outer.missing" not in sys.modules
    assert inner.ran and inner.value == 1 and inner is sys.modules["outer"].inner
    delay("outer.inner")
    assert inner is sys.modules["outer.inner"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "outer"]:
        monkeypatch.delitem(sys.modules, name)
