"""Training under autocast: bf16 runs every method, on a CPU too; fp16 needs a GPU."""

import itertools
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import teachers
from distill.grid import uniform
from distill.progressive import Progressive
from distill.regression import Regression
from distill.regularize import RESIDUALS, Regularized
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes import consistency, progressive
from recipes import teacher as teacher_recipe
from recipes.common.building import method_of, student_of
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS
from recipes.data import sets
from teachers.students import untrained

TEACHER, DATA = teachers.load("digits"), sets.load("digits")
ROUNDING = 4 * 2.0**-16  # absolute error of a mean of squares: four times the square of 2^-8, the spacing of bf16 just below 1
STUDENT = untrained(TEACHER.shape, TEACHER.classes, (8, 16), 1, seed=0)


@pytest.fixture
def accelerator_of():
    def of(precision):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision=precision)

    yield of
    AcceleratorState._reset_state(reset_partial_state=True)


def method_cases():
    for name, defaults in METHODS.items():
        for jvp in ("finite", "exact") if "jvp" in defaults.takes else ("finite",):
            flags = MethodFlags(method=name, jvp=jvp)
            student = student_of(flags, STUDENT)
            yield pytest.param(method_of(flags, TEACHER, student, DATA, 0), student, id=f"{name}-{jvp}")
    for name in RESIDUALS:
        yield pytest.param(Regularized(Regression(Mix(TEACHER.denoiser)), ((name, 1.0),)), STUDENT, id=name)
    times = uniform(TEACHER.denoiser.schedule, 8)
    yield pytest.param(
        Progressive(TEACHER.denoiser, times), replace(STUDENT, denoiser=on_teachers_schedule()), id="progressive"
    )


def on_teachers_schedule():
    return replace(TEACHER.denoiser, net=STUDENT.denoiser.net)


def losses(method, student, accelerator, steps=3):
    o = Optimization(images=16 * steps, batch_size=16, lr=1e-4, ema_halflife_images=64)
    batches = DATA.batches(BatchSplit(16), 0, "p", accelerator.device, student.condition)
    states = train(method, student.student(), batches, accelerator, o, seed=0, phase="p")
    return torch.stack([state.loss for state in itertools.islice(states, steps)])


@pytest.mark.slow
@pytest.mark.parametrize("method, student", method_cases())
def test_the_losses_of_a_method_in_bf16_are_those_in_float32_within_3_percent_and_rounding(method, student, accelerator_of):
    half, full = (losses(method, student, accelerator_of(precision)) for precision in ("bf16", "no"))
    assert not torch.equal(half, full), "bf16 was not used"
    assert torch.allclose(half, full, rtol=0.03, atol=ROUNDING), (half, full)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [consistency, progressive, teacher_recipe])
def test_fp16_is_refused_on_a_cpu_before_anything_is_written(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.main(["--preset", "smoke", "--mixed-precision", "fp16", "--output-dir", str(tmp_path / "run")])
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert "fp16 needs a GPU: accepted on a CPU are no and bf16" in capsys.readouterr().err
