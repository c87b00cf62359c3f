"""On a GPU that is only pretended (`fake_cuda`): nothing mixes devices, no step waits for the device, and launches are few.

The fake itself is held to what CUDA does.
"""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fake_cuda import CUDA, FakeCuda, MixedDevices
from pipelines import ldm, vae

import teachers
from distill.consistency import Consistency, Gap
from distill.denoiser import on_schedule
from distill.device import send
from distill.grid import uniform
from distill.likelihood import bound
from distill.progressive import Progressive
from distill.regression import Regression
from distill.regularize import RESIDUALS, Regularized
from distill.resume import Resumable
from distill.samplers import SAMPLERS
from distill.sampling import Sampling
from distill.schedule import EDM
from distill.target import Mix
from distill.teacher_bias import TeacherBias
from distill.train import BatchSplit, Optimization, train
from eval.generate import images, initial_noise
from recipes import classifier, consistency, evaluate, export, latents, progressive, sample, search, teacher, variance
from recipes.common.building import method_of, student_of
from recipes.common.method_flags import MethodFlags
from recipes.common.methods import METHODS
from recipes.data import sets
from teachers.probe import probe
from teachers.students import with_two_times

DATA = sets.load("digits")
LAUNCHES = 150  # outside of the networks, in a training step
MORE = {"cmt": 300, "dmd": 350, "sid": 350}  # with 17 network calls a step, or six steps of two optimizers


@contextmanager
def pretended():
    AcceleratorState._reset_state(reset_partial_state=True)
    with FakeCuda() as gpu:
        yield gpu
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu():
    with pretended() as gpu:
        yield gpu


def waits(gpu):
    return dict(gpu.syncs)


# -- the fake ----------------------------------------------------------------------------------------------------------------------
def test_the_fake_refuses_tensors_of_two_devices_and_lets_numbers_through(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    with pytest.raises(MixedDevices, match=r"found cuda \(3,\), cpu \(3,\) at tests/test_device.py"):
        there + here
    with pytest.raises(MixedDevices):
        torch.stack([there[0], here[0]])
    with pytest.raises(MixedDevices):
        here.add_(there[0])
    with pytest.raises(MixedDevices, match="generator"):
        torch.randn(3, generator=torch.Generator(), device="cuda")
    assert (there * here[0]).device == CUDA and torch.zeros_like(there[:2]).is_cuda and not here.is_cuda
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize(
    "wait, times",
    [
        (lambda x: float(x[0]), 1),
        (lambda x: bool(x.isfinite().all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.ones(3).copy_(x), 1),
        (lambda x: x + torch.ones(3).to(x), 1),
        (lambda x: x + torch.tensor([1.0, 2, 3], device=x.device), 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x + torch.ones(3).to(x.device, non_blocking=True), 0),
        (lambda x: x + torch.ones(3).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: x.double().clamp(min=0).sum() * 2.0, 0),
    ],
)
def test_the_fake_counts_every_wait_of_the_host_and_no_other_operator(gpu, wait, times):
    x = torch.ones(3).to("cuda")
    gpu.reset()
    wait(x)
    assert sum(gpu.syncs.values()) == times
    assert all(line.startswith("tests/test_device.py") for _, line in gpu.syncs)


def test_the_fake_counts_copies_from_memory_that_is_not_pinned(gpu):
    for source, pageable in ((torch.ones(3), 1), (torch.ones(3).pin_memory(), 0)):
        gpu.reset()
        assert source.to("cuda", non_blocking=True).is_cuda
        assert sum(gpu.pageable.values()) == pageable


def test_a_copy_to_the_host_that_does_not_block_arrives_when_the_host_has_waited_for_it(gpu):
    there, stream = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    early = there.to("cpu", non_blocking=True)
    event = stream.record_event()
    there.add_(1)
    late, whole = there.to("cpu", non_blocking=True), (3 * there).long().to("cpu", non_blocking=True)
    assert not early.is_cuda and not gpu.syncs and early.isnan().all() and late.isnan().all()
    event.synchronize()
    assert early.tolist() == [1, 1, 1] and late.isnan().all() and sum(gpu.syncs.values()) == 1
    there.sum().item()
    assert late.tolist() == [2, 2, 2] and whole.tolist() == [6, 6, 6] and sum(gpu.syncs.values()) == 2


def test_the_fake_tells_the_launches_of_a_network_from_those_outside_in_both_passes(gpu):
    net = torch.nn.Linear(3, 3).to("cuda")
    gpu.watch(net)
    x = torch.ones(2, 3, device="cuda")
    gpu.reset()
    loss = (2 * net(x)).sum()
    assert gpu.total("network") == 1 and gpu.total("outside") == 2  # addmm; mul, sum
    loss.backward()
    assert gpu.total("network") > 1 and gpu.total("outside") == 4  # ones of the gradient, mul


def test_sending_neither_waits_nor_copies_from_pageable_memory(gpu):
    sent = send(torch.arange(3.0), CUDA)
    assert sent.is_cuda and send(sent, CUDA) is sent and not (gpu.syncs or gpu.pageable)
    _, slope = torch.func.jvp(lambda a: send(a.sin(), CUDA) * sent, (torch.ones(3),), (torch.ones(3),))
    assert slope.is_cuda and torch.allclose(slope.cpu(), torch.arange(3.0) * torch.ones(3).cos())


# -- training ----------------------------------------------------------------------------------------------------------------------
def digits():
    """The teacher anew: a network that was moved to the fake must not be seen by other tests."""
    return teachers.load("digits")


def of_method(name, **flags):
    def build(teacher):
        described = MethodFlags(method=name, **flags)
        student = student_of(described, teacher)
        return student, method_of(described, teacher, student, DATA, 0)

    return build


def on_edm(teacher):
    """A student on another schedule than the teacher's, whose target weighs the teacher by noise level."""
    student = replace(teacher, denoiser=replace(teacher.denoiser, schedule=EDM(), prediction="edm", time="log_sigma"))
    return student, Consistency(
        Mix(teacher.denoiser, torch.linspace(0, 1, 23), torch.linspace(-9, 13, 23)), Gap(), averaged=True
    )


CASES = {
    **{name: of_method(name) for name in METHODS},
    **{f"{name}-exact": of_method(name, jvp="exact") for name in METHODS if "jvp" in METHODS[name].takes},
    **{name: lambda teacher, name=name: (teacher, Regularized(Regression(Mix(teacher.denoiser)), ((name, 1.0),))) for name in RESIDUALS},
    "posterior-mean": of_method("ect", target="posterior-mean"),
    "progressive": lambda teacher: (teacher, Progressive(teacher.denoiser, uniform(teacher.denoiser.schedule, 8))),
    "guided": lambda teacher: (teacher, Progressive(teacher.guided(2.0), uniform(teacher.denoiser.schedule, 8))),
    "edm": on_edm,
}  # fmt: skip
EXACT = [name for name in CASES if name.endswith("-exact") or name == "fokker-planck"]


@cache
def measured(name):
    """The waits, the pageable copies and the launches outside of the networks in the second training step of a case."""
    with pretended() as gpu:
        steps = training(gpu, CASES[name], images=16_000)  # no checkpoint or look for bad steps is due
        next(steps)
        gpu.reset()
        assert next(steps).loss.is_cuda
        return waits(gpu), set(gpu.pageable), gpu.total("outside")


def training(gpu, build, steps=4, images=64, **kwargs):
    teacher, accelerator = digits(), Accelerator()
    student, method = build(teacher)
    teacher.to(accelerator.device)
    trained = student.student()
    gpu.watch(teacher.denoiser.net, trained.net)
    o = Optimization(images=images, batch_size=16, ema_halflife_images=64)
    batches = DATA.batches(BatchSplit(16), 0, "p", accelerator.device, student.condition)
    return itertools.islice(train(method, trained, batches, accelerator, o, seed=0, phase="p", **kwargs), steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_step_never_waits_for_the_device(name):
    assert measured(name)[0] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_step_copies_from_pinned_memory_alone_except_within_transforms(name):
    places = {line.partition(":")[0] for _, line in measured(name)[1]}
    assert places <= ({"distill/device.py"} if name in EXACT else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "fokker-planck"])  # whose derivatives are the network's
def test_a_training_step_launches_little_outside_of_the_networks(name):
    assert measured(name)[2] <= MORE.get(name, LAUNCHES)


@pytest.mark.slow
def test_training_continues_from_a_checkpoint_to_the_same_weights(gpu, tmp_path):
    whole = [state.student for state in training(gpu, CASES["ect"])][-1]
    kept = {"resumable": Resumable(tmp_path), "save_every_images": 32}
    list(training(gpu, CASES["ect"], 3, **kept))  # a checkpoint after 2 steps
    first, *_, last = training(gpu, CASES["ect"], **kept)
    assert first.step == 3
    assert all(
        torch.equal(a.cpu(), b.cpu()) for a, b in zip(whole.net.parameters(), last.student.net.parameters(), strict=True)
    )


# -- sampling ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "rescheduled", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_never_waits_for_the_device_and_copies_from_pinned_memory_alone(gpu, name, kind):
    model = with_two_times(digits()) if SAMPLERS[name].two_times else digits()
    model.to(CUDA)
    table = model.denoiser
    denoiser = {"table": table, "rescheduled": on_schedule(table, EDM()), "guided": model.guided(2.0)}[kind]
    sampling, noise = Sampling(name), initial_noise(range(4), model.shape, model.classes, 0)
    times, x, cond = sampling.times_for(denoiser.schedule, 5), noise.noise.to(CUDA), model.condition(noise.labels.to(CUDA))
    gpu.reset()
    with torch.inference_mode():
        assert sampling.run(denoiser, x, times, noise.fresh, **cond).is_cuda
    assert not gpu.syncs and not gpu.pageable


# -- recipes -----------------------------------------------------------------------------------------------------------------------
MEASURED = ["--preset", "smoke", "--images", "40", "--chunk", "40"]
SHORT = [*MEASURED, "--batch-size", "16", "--sweep-steps", "2"]
SCRATCH = ["--from-scratch", "--channels", "8", "16", "--training-images", "64", "--mixed-precision", "bf16"]
RECIPES = {
    "progressive": [progressive, *SHORT, "--start-steps", "2", "--images-per-stage", "32"],
    "consistency": [consistency, *SHORT, *SCRATCH, "--method", "meanflow", "--steps", "1", "2"],
    "evaluate": [
        evaluate,
        *MEASURED,
        "--steps",
        "2",
        "--baseline-steps",
        "0",
        "--samplers",
        "consistency:0.5",
        "--metrics",
        "fid",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_mixes_no_devices_from_training_to_its_report_and_pipeline(gpu, tmp_path, name):
    recipe, *arguments = RECIPES[name]
    recipe.main([*arguments, "--output-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.json").exists()
    if name == "progressive":
        assert (tmp_path / "run" / "pipeline").exists()


OTHERS = {
    "teacher": [teacher, "--training-images", "32", "--batch-size", "16", "--channels", "8", "16"],
    "variance": [variance, "--levels", "2", "--samples", "8", "--gradients", "2", "--batch-size", "8", "--training-images", "16"],
    "search": [search, "--steps", "2", "--nodes", "4", "--proxy-images", "40", "--images", "40", "--chunk", "40"],
    "export": [export],
    "classifier": [classifier, "--preset", "smoke", "--epochs", "1", "--batch-size", "256"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_recipe_mixes_no_devices(gpu, tmp_path, name):
    recipe, *arguments = OTHERS[name]
    recipe.main([*arguments, "--output-dir", str(tmp_path / "run")])
    assert any((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_samples_of_a_few_step_student_are_drawn_on_the_device(gpu, tmp_path):
    sample.main(["--images", "4", "--steps", "2", "--sampler", "consistency:0.5", "--output", str(tmp_path / "samples.png")])
    assert (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_a_latent_model_encodes_and_generates_on_the_device(gpu, tmp_path):
    ldm(tmp_path, vae()).save_pretrained(tmp_path / "ldm")
    np.savez(tmp_path / "images.npz", images=np.zeros((32, 16, 16, 3), dtype=np.uint8))
    latents.main(f"--model {tmp_path / 'ldm'} --data {tmp_path / 'images.npz'} --output-dir {tmp_path / 'latents'}".split())
    model = teachers.load(str(tmp_path / "ldm")).to(CUDA)
    (batch,) = images(model, Sampling("consistency"), 2, [range(2)], 0, CUDA)
    assert batch.images.is_cuda and len(sets.load(str(tmp_path / "latents")).images) == 32


@pytest.mark.slow
def test_a_teacher_is_probed_and_its_bias_estimated_on_the_device(gpu):
    teacher = digits().to(CUDA)
    x0, labels = DATA.x0(slice(0, 64), CUDA), DATA.labels[:64].to(CUDA)
    assert probe(teacher, DATA.x0(slice(None), CUDA), DATA.labels, levels=3, samples=6).ok
    errors = TeacherBias(teacher.denoiser, x0, labels, teacher.condition).errors(
        teacher.denoiser.schedule, torch.tensor([-2.0, 2.0]), torch.Generator().manual_seed(0), 16
    )
    assert all(value.shape == (2,) and not value.is_cuda for value in errors.values())
    assert bound(teacher.denoiser, x0, torch.Generator(), levels=2, labels=labels).total.isfinite().all()
