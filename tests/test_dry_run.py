"""--dry-run of latent and text teachers needs configurations alone: hollow networks have the shapes, memory and work of real ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import here, refuses
from flow_pipelines import FLOWS
from pipelines import FAMILIES, ldm, sd, vae
from test_cost import Timeless
from torch import nn

import teachers
from distill.denoiser import Denoiser
from distill.grid import uniform
from distill.guidance import GuidanceRange
from distill.progressive import Progressive
from distill.regression import Regression
from distill.schedule import Flow
from distill.target import Mix
from recipes import consistency, evaluate, guided, latents, teacher
from recipes.common import outline
from recipes.common.plan import count_operations, training_memory
from teachers import hub, saved
from teachers.encoder import Encoder
from teachers.hollow import META, has_weights, is_hollow
from teachers.students import with_guidance


@pytest.fixture
def other_precision():
    """Let a run have another precision than the runs before it in this process, and those after it than this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


LINES = ("network", "data", "training", "sweep", "together", "memory", "fits", "disk", "output")


def hollowed(folder: Path, to: Path) -> Path:
    """Copy a pipeline without its weights."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Stable Diffusion pipeline, its configurations alone, and a file of prompts."""
    folder = tmp_path_factory.mktemp("made")
    sd(folder / "words").save_pretrained(folder / "sd")
    hollowed(folder / "sd", folder / "bare")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def plan(capsys, recipe, model, data, out, *more):
    """The lines of a plan by their names."""
    few = "--batch-size 4 --features test_latent_runs:Pool --dry-run"
    with pytest.raises(SystemExit) as stop:
        here(recipe.main, few, "--teacher", model, "--data", data, "--output-dir", out, *more)
    said = capsys.readouterr()
    assert stop.value.code == 0 and not out.exists(), said.err
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in said.out.splitlines() if line.strip().startswith(LINES)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [consistency, guided], ids=lambda recipe: recipe.__name__)
def test_a_dry_run_of_a_text_teacher_reads_no_weights_and_says_all_but_measured_times(
    made, tmp_path, capsys, recipe, other_precision
):
    data = f"prompts:{made / 'prompts.txt'}"
    found = plan(capsys, recipe, made / "bare", data, tmp_path / "run", "--mixed-precision", "bf16")
    assert tuple(found) == LINES
    net = teachers.load(str(made / "sd")).parametric.net
    if recipe is consistency:
        assert found["network"] == f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M weights"
    assert "TFLOP, " in found["training"] and "A100 at 40 % of its 312 TFLOP/s" in found["sweep"]
    assert found["together"].startswith("unknown: no step was measured")
    assert all(f"{size} GB: " in found["fits"] for size in (24, 48, 80))
    assert all(kind in found["memory"] for kind in ("Adam", "teacher")) and re.search("activations [1-9]", found["memory"])


def test_a_dry_run_of_a_new_teacher_says_time_and_memory_and_writes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        here(teacher.main, "--preset smoke --dry-run --output-dir", tmp_path / "run")
    said = capsys.readouterr()
    assert stop.value.code == 0 and not (tmp_path / "run").exists(), said.err
    assert re.search("steps: about .* s", said.out) and re.search("memory of training [1-9].* 24 GB: [1-9]", said.out)


@pytest.mark.slow
def test_a_dry_run_of_a_latent_teacher_on_latents_needs_no_autoencoder(tmp_path, capsys):
    ldm(tmp_path, vae()).save_pretrained(tmp_path / "ldm")
    np.savez(tmp_path / "few.npz", images=np.zeros((8, 16, 16, 3), np.uint8))
    real = ("--features test_latent_runs:Pool --images 40 --chunk 40 --steps 1 --samplers ddim --data", tmp_path / "few.npz")
    here(evaluate.main, *real, "--model", tmp_path / "ldm", "--output-dir", tmp_path / "measured")
    here(latents.main, "--model", tmp_path / "ldm", "--data", tmp_path / "few.npz", "--output-dir", tmp_path / "latents")
    bare = hollowed(tmp_path / "ldm", tmp_path / "bare")
    reference = ("--reference", tmp_path / "measured" / "reference.safetensors")
    found = plan(capsys, consistency, bare, tmp_path / "latents", tmp_path / "run", *reference)
    assert "8 images of 4x8x8" in found["data"] and "no step was measured" in found["together"]


def test_steps_are_measured_where_the_weights_are_there_and_the_network_is_small(made, monkeypatch):
    def hollow(model, dry_run=True):
        return outline.teacher_of(SimpleNamespace(dry_run=dry_run, teacher=str(made / model))).hollow

    assert not hollow("sd") and hollow("bare")
    monkeypatch.setattr(outline, "SMALL", 100)
    assert hollow("sd") and not hollow("sd", dry_run=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU measures large ones too
    assert not hollow("sd") and hollow("bare")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *FLOWS])
def test_a_hollow_pipeline_has_the_description_and_the_shapes_of_the_real_one(tmp_path, name):
    ({**FAMILIES, **FLOWS}[name])(tmp_path / "made").save_pretrained(tmp_path / "whole")
    bare = hollowed(tmp_path / "whole", tmp_path / "bare")
    real, hollow = teachers.load(str(tmp_path / "whole")), teachers.load(str(bare), weights=False)
    assert has_weights(tmp_path / "whole") and not has_weights(bare) and hollow.hollow and not real.hollow
    assert (hollow.network, hollow.shape, hollow.image_shape) == (real.network, real.shape, real.image_shape)
    shapes = ({k: v.shape for k, v in model.parametric.net.state_dict().items()} for model in (real, hollow))
    assert next(shapes) == next(shapes)
    if real.embeddings is not None:
        one, two = (
            Encoder.of(model, **how).table(["a cat", "blue"]) for model, how in ((real, {}), (hollow, {"device": META}))
        )
        assert [(k, v.shape, v.dtype) for k, v in one.null.items()] == [(k, v.shape, v.dtype) for k, v in two.null.items()]
        assert two.count == 2 and two.encoder == ""


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_hollow_networks_need_the_memory_of_real_ones(made, precision):
    found = []
    accelerator = SimpleNamespace(mixed_precision=precision, num_processes=1, distributed_type=DistributedType.NO)
    for model in (teachers.load(str(made / "sd")), teachers.load(str(made / "bare"), weights=False)):
        table = Encoder.of(model, device=META if model.hollow else torch.device("cpu")).table(["a cat"])
        model = model.with_conditions(table)
        method = Regression(Mix(model.guided(2.0)))
        batch = torch.zeros(3, 4, 8, 8), model.condition(torch.zeros(3, dtype=torch.long))
        x0, cond = outline.placed(model, *batch)
        found.append(training_memory(method, model.student(), x0, cond, accelerator, frozen=7, averaged=True))
    kept = [cost.activations for cost in found]
    assert kept[1] == pytest.approx(kept[0], rel=1e-4) and kept[0] > 3 * 4 * 8 * 8 * 4  # but for copies of coefficients
    assert found[0].memory - kept[0] == found[1].memory - kept[1]


def test_operations_are_two_for_a_multiplication_and_three_passes_for_a_step():
    """A linear layer of 8 to 8 on 3 samples: no gradient reaches its input."""
    with META:
        student = Denoiser(Timeless(nn.Linear(8, 8, bias=False)), Flow(), "x0")

    def method(student, x0, *, rng, progress, **cond):
        return student(x0, rng.uniform()).square().mean(1)

    step, call = count_operations(method, student, torch.zeros(3, 8, device="meta"), {})
    assert (call, step) == (2 * 8 * 8, 2 * 2 * 8 * 8)


@pytest.mark.slow
def test_calls_of_the_teacher_that_are_alike_happen_once_and_all_count(made):
    """Progressive distillation from pure noise calls a guided teacher at every step before its own."""
    model = teachers.load(str(made / "bare"), weights=False)
    model = model.with_conditions(Encoder.of(model, device=META).table(["a cat"]))
    x0, cond = outline.placed(model, torch.zeros(2, 4, 8, 8), model.condition(torch.zeros(2, dtype=torch.long)))
    method = Progressive(model.guided(2.0), uniform(model.denoiser.schedule, 4), data_free=True)
    net, made_calls = model.parametric.net, []
    net.net.register_forward_hook(lambda *_: made_calls.append(1))
    found = []
    for nets in ([net, net], []):
        made_calls.clear()
        found.append((*count_operations(method, model.student(), x0, cond, *nets), len(made_calls)))
    assert found[0][:2] == found[1][:2] and found[0][2] < found[1][2]


def test_a_student_that_takes_the_scale_is_hollow_too_and_a_wrong_configuration_is_one_line(made, tmp_path):
    model = teachers.load(str(made / "bare"), weights=False)
    model = model.with_conditions(Encoder.of(model, device=META).table(["a"]))
    student = with_guidance(model, GuidanceRange(1.0, 4.0))
    assert student.hollow and all(weight.device == META for weight in student.parametric.net.parameters())
    assert not is_hollow(teachers.load("digits").parametric.net)
    wrong = hollowed(made / "bare", tmp_path / "wrong")
    config = wrong / "unet" / "config.json"
    config.write_text(config.read_text().replace('"DownBlock2D"', '"NoBlock"'))
    refuses("unet/config.json does not fit a UNet2DConditionModel", lambda: teachers.load(str(wrong), weights=False))


def test_the_size_of_a_description_is_computed_once_however_many_students_are_loaded(ladder, monkeypatch):
    saved._size_of.cache_clear()
    built = []
    build = saved.networks.build
    monkeypatch.setattr(saved.networks, "build", lambda *given: built.append(given) or build(*given))
    for _ in range(3):
        for steps in (2, 1):
            teachers.load(str(ladder / "stages" / str(steps) / "student.safetensors"))
    assert len(built) == 6 + 1


def test_a_plan_downloads_all_but_the_weights(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "reached", lambda *_: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda where, **how: asked.append((where, how)) or str(tmp_path))
    assert hub.fetch("owner/name", weights=False) == tmp_path
    assert asked == [("owner/name", {"allow_patterns": ["*.json", "*.txt", "*.model"], "local_files_only": False})]
