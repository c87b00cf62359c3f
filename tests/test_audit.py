"""The audit gives students back the settings that they were made for, and refuses a model that is far from its base."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import refuses, words

import teachers
from distill.denoiser import Denoiser
from distill.grid import GRIDS
from distill.progressive import Progressive
from distill.regression import Regression
from distill.sampling import Sampling
from distill.schedule import EDM, Cosine, Flow, explain, prior_std
from distill.target import Mix
from distill.train import Optimization, train
from recipes import audit
from teachers import Teacher, passport
from teachers.diffusers_scheduler import table_of
from teachers.oracle import Gaussian
from teachers.teacher import frozen

SHAPE, STD = (1, 4, 4), 0.6
DIGITS_TABLE = table_of({"num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True})


def means() -> torch.Tensor:
    """The means of two classes and of the unconditional case."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Base:
    """E[x0 | x_t] of two Gaussian classes of one width; label 2 is the unconditional case."""

    schedule: object

    def __call__(self, x_t, t, to=None, *, labels):
        return Gaussian(self.schedule, means()[labels], torch.tensor(STD))(x_t, t)


@dataclass(frozen=True)
class Student:
    """The exact map of the base under guidance along ``times``: from each of them to the next. Between them jumps are interpolated.

    Guidance of Gaussians of one width is the Gaussian with the guided mean. The first time stands for pure noise, also if it is below.
    """

    schedule: object
    times: tuple[float, ...]
    guidance: float

    def unit(self, t):
        return prior_std(self.schedule, torch.tensor(self.schedule.t_max)) / prior_std(self.schedule, t)

    def __call__(self, x_t, t, to=None, *, labels):
        start, end = np.array(self.times[:-1])[::-1], np.array(self.times[1:])[::-1]
        s = torch.tensor(np.interp(float(t), start, end), dtype=t.dtype).clamp(max=float(t) * (1 - 1e-6))
        mean = means()[2] + self.guidance * (means()[labels] - means()[2])
        x, at = (x_t, t) if float(t) < start[-1] else (x_t * self.unit(t), torch.full_like(t, self.schedule.t_max))
        moved = Gaussian(self.schedule, mean, torch.tensor(STD)).flow(x, at, s)
        return explain(self.schedule, x_t.double(), moved.double(), t, s).to(x_t)


def shifted(steps, shift):
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


STUDENTS = {  # name -> schedule, times, shift, guidance
    "one step": (Cosine(), [1.0, 0.0], 1.0, 1.0),
    "one step, guidance 3": (DIGITS_TABLE, [1.0, 0.0], 1.0, 3.0),
    "two steps, guidance 1.5": (Cosine(), [1.0, 0.5, 0.0], 1.0, 1.5),
    "four trailing entries of a table": (DIGITS_TABLE, [1.0, 0.75, 0.5, 0.25, 0.0], 1.0, 1.0),
    "eight, guidance 7.5": (DIGITS_TABLE, torch.linspace(1, 0, 9), 1.0, 7.5),
    "four leading entries": (DIGITS_TABLE, [(768 + 2) / 1024, (512 + 2) / 1024, (256 + 2) / 1024, 2 / 1024, 0.0], 1.0, 1.0),
    "flow, four steps, shift 3": (Flow(), shifted(4, 3.0), 3.0, 1.0),
    "flow, two steps, shift 5, guidance 2": (Flow(), shifted(2, 5.0), 5.0, 2.0),
    "flow, eight steps": (Flow(), shifted(8, 1.0), 1.0, 4.0),
    "Karras' levels": (EDM(), GRIDS["karras"](EDM(), 6), 1.0, 1.0),
}


def pair(schedule, times, guidance):
    """The student without its passport, and its base."""
    base = Teacher(Base(schedule), SHAPE, classes=2, null=2, record={"source": "base"})
    return replace(base, denoiser=Student(schedule, tuple(map(float, times)), guidance)), base


def config(**options):
    return audit.Config(model="student", teacher="base", samples=16, base_steps=32, **options)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_without_their_passports_get_them_back(name):
    schedule, times, shift, guidance = STUDENTS[name]
    model, base = pair(schedule, times, guidance)
    ranked = audit.search(model, base, config())
    found = audit.passport_of(model, base, ranked, "base")
    n = len(times) - 1
    assert found.steps == (n,) and found.guidance == (
        {"rule": "none"} if guidance == 1 else {"rule": "distilled", "scale": guidance}
    )
    stated = passport.sigmas_of(schedule, torch.as_tensor(times, dtype=torch.float64))
    assert torch.allclose(torch.tensor(found.sigmas[str(n)], dtype=torch.float64), stated, atol=1e-6)
    assert found.shift == (shift if isinstance(schedule, Flow) and n > 1 else 1.0 if isinstance(schedule, Flow) else None)
    assert ranked[0][0] < 0.02 and found.found["next"]["distance"] > 1.2 * ranked[0][0]
    assert found.teacher == {"source": "base", "sha256": base.fingerprint}


def test_another_setting_is_found_for_another_student():
    """What the audit says depends on the student: with the jumps of 2 steps in place of 4, it says 2."""
    for n in (4, 2):
        model, base = pair(Cosine(), torch.linspace(1, 0, n + 1), 1.0)
        assert audit.search(model, base, config(guidance=(1.0,)))[0][1].steps == n


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_is_nearer_to_the_fine_samples_than_its_base_at_the_same_setting_and_the_base_is_not(steps):
    model, base = pair(Cosine(), torch.linspace(1, 0, steps + 1), 1.0)
    for one, nearer in ((model, True), (base, False)):
        near, setting = audit.search(one, base, config(steps=(steps,), guidance=(1.0,)))[0]
        assert (near < audit.GAIN * audit.distance_of_base(one, base, setting, config())) == nearer


def test_shifted_times_are_those_of_the_flow_scheduler_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift, n in ((3.0, 4), (1.0, 8), (5.0, 2)):
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(sigmas=[1 - i / n for i in range(n)])
        ours = [times for name, s, times in audit.grids(Flow(), n, (shift,)) if (name, s) == ("uniform", shift)]
        assert torch.allclose(ours[-1].float(), theirs.sigmas, atol=1e-6)


def test_leading_entries_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1024, timestep_spacing="leading", steps_offset=1)
    for n in (1, 4, 6):
        theirs.set_timesteps(n)
        assert (audit.leading(DIGITS_TABLE, n)[:-1] * 1024 - 1).round().long().tolist() == theirs.timesteps.tolist()


def test_models_that_do_not_belong_together_are_refused(teacher):
    model, base = pair(Cosine(), [1.0, 0.0], 1.0)
    refuses("the model makes (1, 4, 4) ... its base (1, 8, 8)", audit.search, model, teacher, config())
    assert audit.search(replace(model, denoiser=replace(model.denoiser, guidance=30.0)), base, config())[0][0] > audit.ACCEPTED


@pytest.mark.slow
def test_a_pipeline_without_a_passport_gets_one(teacher, tmp_path, stock_here, refused, capsys):
    from teachers.export import deliver

    deliver.export_pipelines(replace(teacher, sampling=Sampling(steps=(64,))), tmp_path)
    folder = tmp_path / "pipeline"
    (folder / "passport.json").unlink()
    few = words("--model", folder, "--teacher digits --samples 8 --base-steps 16 --guidance 1")
    line = refused(audit.main, *few, "--steps 1")  # a teacher is no student of one step
    assert "standard deviations from its base at best" in line and not (folder / "passport.json").exists()
    line = refused(audit.main, *few, "--steps 1 16")  # nor of 16, where it is the teacher itself
    assert "it was not distilled for these --steps" in line and not (folder / "passport.json").exists()
    audit.main([*few, "--steps", "1", "16", "--force"])
    assert "16 steps" in capsys.readouterr().out.splitlines()[-1]
    made = json.loads((folder / "passport.json").read_text())
    assert made["steps"] == [16] and made["teacher"]["source"] == "digits" and made["found"]["distance"] < 0.5
    assert teachers.load(str(folder)).sampling.steps == (16,)
    audit.main(few)
    assert "has a passport, for 16 steps: it makes the same images" in capsys.readouterr().out


class Net(torch.nn.Module):
    """A small network of x [B, 2] and t [B]."""

    def __init__(self):
        super().__init__()
        width = 96
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(10, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, t):
        waves = torch.arange(1, 5) * torch.pi / 2 * t[:, None]
        return self.layers(torch.cat([x, waves.sin(), waves.cos()], 1))


@pytest.mark.slow
def test_trained_students_get_their_step_counts_back():
    """A ladder of students of 4, 2 and 1 steps, distilled from the exact denoiser of a mixture of eight Gaussians."""
    torch.manual_seed(0)
    base = teachers.load("oracle:mixture")
    centres = base.denoiser.means

    def batches(step):
        rng = torch.Generator().manual_seed(step)
        while True:
            yield centres[torch.randint(8, (128,), generator=rng)] + 0.1 * torch.randn(128, 2, generator=rng), {}

    def trained(method, student, steps, phase):
        budget = Optimization(128 * steps, 128, lr=3e-3, constant=0.3, ema_halflife_images=5_000)
        for state in train(method, student, batches, Accelerator(cpu=True), budget, seed=0, phase=phase):
            ema = state.ema
        return replace(ema, net=frozen(ema.net))

    student = trained(Regression(Mix(base.denoiser)), Denoiser(Net(), base.denoiser.schedule, "v"), 2000, "v")
    for n in (4, 2, 1):
        times = GRIDS["uniform"](base.denoiser.schedule, 2 * n)
        copied = replace(student, net=copy.deepcopy(student.net).requires_grad_(True))
        student = trained(Progressive(student, times), copied, 1200, str(n))
        model = Teacher(student, (2,))
        ranked = audit.search(model, base, config(steps=(1, 2, 4, 8)))
        assert (ranked[0][1].steps, ranked[0][1].grid) == (n, "uniform"), (n, [(d, str(s)) for d, s in ranked[:4]])
