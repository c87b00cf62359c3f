"""A bad step is noticed, named, kept and not taken; training goes on from the last good state, to the same bits if it is killed."""

import copy
import json
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import together
from test_train import batches, student, weights

import teachers
from distill import files
from distill import train as training
from distill.divergence import EVERY, SPIKE, WINDOW, Diverged, Recorder
from distill.progressive import Progressive
from distill.regression import Regression
from distill.replay import SavedStep
from distill.resume import Resumable
from distill.rng import Rng, seed_of
from distill.schedule import Cosine, add_noise
from distill.train import BatchSplit, Optimization, train
from recipes import consistency, progressive
from recipes.common.checks import check_finite_data
from recipes.data.sets import Data

MARK = 7.25  # a value that no sample of the data has


@dataclass(frozen=True)
class Broken:
    """Regression whose loss is multiplied by ``value`` for marked samples."""

    value: float

    def __call__(self, student, x0, *, rng, progress, **cond):
        marked = (x0 == MARK).any(1)
        clean = torch.where(marked[:, None], 0.5, x0)
        return Regression()(student, clean, rng=rng, progress=progress) * torch.where(marked, self.value, 1.0)


def poisoned(split, step, row, ever=False):
    """The batches of test_train, with one marked sample in the batch of ``step``, or from it on."""

    def stream(first):
        turn = first * split.accumulate
        for x0, cond in batches(split)(first):
            at, part = turn // split.accumulate, split.rows(turn % split.accumulate)
            if (at == step or (ever and at > step)) and part.start <= row < part.stop:
                x0[row - part.start, 0] = MARK
            yield x0, cond
            turn += 1

    return stream


O = Optimization(images=60 * 64, batch_size=64, lr=0.01, ema_halflife_images=200)  # noqa: E741


def run(value, step=40, row=5, o=O, ever=False, accelerator=None, stop=None, **kwargs):
    model = student()
    stream = poisoned(BatchSplit(o.batch_size, microbatch=o.microbatch), step, row, ever)
    states = train(Broken(value), model, stream, accelerator or Accelerator(cpu=True), o, seed=0, phase="p", **kwargs)
    return model, list(islice(states, stop))


def drawn(step):
    """The random numbers of a step, and its times: uniform from t_min = 0.001 to 1."""
    rng = Rng(torch.Generator().manual_seed(seed_of(0, "p", step)), 64)
    return rng, 1e-3 + (1 - 1e-3) * rng.uniform()


def level_of(step, row):
    return f"sample {row} at noise level {float(Cosine().level(drawn(step)[1][row])):.3g}"


@pytest.mark.parametrize(("value", "says"), [
    (torch.nan, "the loss of {} is nan"), (torch.inf, "the loss of {} is inf"), (1e6, "most of it from {} with loss"),
])  # fmt: skip
def test_a_bad_step_is_named_by_sample_and_noise_level_and_training_goes_on_without_it(tmp_path, value, says):
    model, states = run(value, resumable=Resumable(tmp_path), save_every_images=8 * 64)
    (text,) = [state.rollback for state in states if state.rollback]
    assert text.startswith("step 40 of phase p: ") and says.format(level_of(40, 5)) in text
    assert "back to step 40 with other random numbers, rollback 1 of at most 2" in text
    assert [state.step for state in states] == [*range(1, 41), *range(41, 61)]
    assert weights(model).isfinite().all() and weights(states[-1].ema).isfinite().all()
    assert [p.name for p in tmp_path.glob("diverged-*")] == ["diverged-000000040.safetensors"]


def test_training_goes_back_to_its_beginning_where_there_is_no_checkpoint_and_the_bad_batch_is_left_out():
    """The same as a run on the data after it with the random numbers of the first rollback."""
    model, states = run(torch.nan, step=3)
    assert [state.step for state in states][:5] == [1, 2, 3, 1, 2] and len(states) == 63
    other = student()

    stream = batches(BatchSplit(64))
    later = lambda step: stream(step + 4)  # noqa: E731
    for _ in train(Broken(1.0), other, later, Accelerator(cpu=True), O, seed=seed_of(0, "rollback", 1), phase="p"):
        pass
    assert torch.equal(weights(model), weights(other))


def test_after_its_rollbacks_a_run_ends_with_one_line_of_advice():
    for most, times in ((0, ""), (1, " after 1 rollback"), (2, " after 2 rollbacks")):
        with pytest.raises(Diverged) as caught:
            run(torch.nan, step=3, ever=True, rollbacks=most)
        line = str(caught.value)
        assert line.startswith(f"training diverged{times} at step ") and "try a lower --lr" in line and "\n" not in line
        assert len(line) < 250


@pytest.mark.parametrize("stop", [3, 21, 23, 30])
def test_a_run_killed_before_or_after_a_rollback_ends_with_the_same_bits(tmp_path, stop):
    whole, states = run(torch.nan, step=20, resumable=Resumable(tmp_path / "a"), save_every_images=8 * 64)
    run(torch.nan, step=20, resumable=Resumable(tmp_path / "b"), save_every_images=8 * 64, stop=stop)
    again, resumed = run(torch.nan, step=20, resumable=Resumable(tmp_path / "b"), save_every_images=8 * 64)
    assert torch.equal(weights(whole), weights(again))
    assert torch.equal(weights(states[-1].ema), weights(resumed[-1].ema))
    assert len(resumed) <= len(states)


def test_a_spike_after_a_resume_is_noticed_as_in_one_go(tmp_path):
    """The median of the norms is part of the checkpoint: 8 steps after one, a run alone would know too few norms."""
    run(1e6, resumable=Resumable(tmp_path), save_every_images=32 * 64, stop=35)
    _, states = run(1e6, resumable=Resumable(tmp_path), save_every_images=32 * 64)
    assert states[0].step == 33 and "step 40" in next(state.rollback for state in states if state.rollback)


def test_a_replay_gives_every_samples_loss_and_level(tmp_path):
    run(torch.nan, resumable=Resumable(tmp_path), save_every_images=8 * 64)
    saved = SavedStep.load(next(tmp_path.glob("diverged-*")))
    model = student()
    loss, level = saved.replay(Broken(torch.nan), model)
    assert loss.isnan().nonzero().tolist() == [[5]] and "sample 5" in saved.finding
    (rng, t), x0 = drawn(40), torch.where(saved.tensors["x0"] == MARK, 0.5, saved.tensors["x0"])
    x_t = add_noise(Cosine(), x0, rng.normal(x0), t)
    torch.manual_seed(seed_of(0, "p", 40, "dropout", 0))
    v_error = (Cosine().level(t)[:, None] ** -2 + 1) * (model(x_t, t) - x0).square()
    assert torch.allclose(level, Cosine().level(t)) and torch.allclose(loss[6:], v_error.mean(1)[6:], rtol=1e-5)
    with pytest.raises(ValueError, match="holds no training step; accepted are the files diverged-"):
        SavedStep.load(Resumable(tmp_path)._paths()[0])


def test_a_sample_whose_gradient_alone_is_not_finite_is_found():
    """|x| written as a square root has a gradient of 0/0 at 0, and the loss 0."""

    def method(student, x0, *, rng, progress, **cond):
        out = student(x0, torch.full((len(x0),), 0.5)).sum(1)
        marked = (x0 == MARK).any(1)
        return (torch.where(marked, out * 0, out).square()).sqrt()

    states = train(method, student(), poisoned(BatchSplit(64), 2, 37), Accelerator(cpu=True), O, seed=0, phase="p")
    text = next(state.rollback for state in states if state.rollback)
    assert "the gradient of sample 37 at noise level" in text and "is not finite, with loss 0" in text


def test_bf16_rolls_back_like_float32(tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, states = run(torch.inf, step=3, accelerator=accelerator)
    AcceleratorState._reset_state(True)
    assert sum(bool(state.rollback) for state in states) == 1 and weights(model).isfinite().all()


def recorder(scaled=False):
    return Recorder.on(torch.device("cpu"), 1.0, scaled)


def number(value):
    return torch.tensor(float(value))


def test_with_a_gradient_scaler_an_infinite_gradient_of_a_finite_loss_is_its_own_business():
    for loss, norm, scaled, bad in [
        (1, torch.inf, True, False), (1, torch.nan, True, False), (torch.nan, torch.nan, True, True), (1, torch.inf, False, True),
        (torch.inf, 1, False, True), (1, 1, False, False),
    ]:  # fmt: skip
        r = recorder(scaled)
        assert bool(r.see(7, number(loss), number(norm))) == bad and r.read() == (7 if bad else None), (loss, norm, scaled)


def test_a_spike_is_a_norm_above_a_thousand_medians_and_above_the_clipped_norm():
    for scale, norm, bad in [
        (0.5, SPIKE * 0.5 * 1.01, True),
        (0.5, SPIKE * 0.5 * 0.99, False),
        (1e-5, 0.5, False),
        (1e-5, 1.5, True),
    ]:
        r = recorder()
        for step in range(WINDOW):
            r.see(step, number(1), number(scale))
        assert bool(r.see(WINDOW, number(1), number(norm))) == bad
    r = recorder()
    assert not r.see(0, number(1), number(1e-9)) and not r.see(EVERY, number(1), number(1e9))  # too early to tell


def test_after_a_bad_step_nothing_is_trained_until_it_is_read():
    r, loss = recorder(), torch.tensor(2.0, requires_grad=True)
    assert torch.autograd.grad(r.guarded(loss * 3), loss)[0] == 3
    r.see(4, number(torch.nan), number(1))
    assert r.guarded(loss).isnan() and r.see(5, number(1), number(1)) == 1 and r.read() == 4
    assert torch.autograd.grad(recorder().guarded(loss + torch.inf), loss)[0].isnan()  # all processes see it in the reduction


def test_the_state_of_a_recorder_is_restored_whole():
    r, other = recorder(), recorder()
    for step in range(40):
        r.see(step, number(1), number(step + 1))
    r.roll_back(38, 30, r.state())
    assert (r.rollbacks, r.skipped) == (1, 9) and r.stream(0) == seed_of(0, "rollback", 1)
    other.restore(r.state())
    assert other.state().keys() == r.state().keys()
    assert all(torch.equal(r.state()[k].nan_to_num(-1), v.nan_to_num(-1)) for k, v in other.state().items())


def train_with_a_broken_sample(folder: Path):
    """In each process: train with one bad sample in one batch, and write what the process saw."""
    torch.set_num_threads(1)
    accelerator, model = Accelerator(cpu=True), student()
    model.net.body[2].p = 0.0  # dropout masks depend on the number of processes
    split = BatchSplit(64, accelerator.num_processes, accelerator.process_index, 16)
    o = Optimization(images=8 * 64, batch_size=64, microbatch=16, lr=0.01)
    states = train(
        Broken(torch.nan), model, poisoned(split, 5, 40), accelerator, o, seed=0, phase="p", resumable=Resumable(folder),
        save_every_images=2 * 64,
    )  # fmt: skip
    found = {"seen": [(state.step, state.rollback) for state in states], "weights": weights(model).tolist()}
    (folder / f"{accelerator.num_processes}-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.slow
def test_all_processes_agree_on_a_bad_step_of_one_of_them_and_train_what_one_process_trains(tmp_path):
    """The marked sample is the second process's; the replay of its file in one process gives the same sample."""
    for world, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        codes, out = together(world, train_with_a_broken_sample, tmp_path / name, log=tmp_path / f"{name}.log")
        assert codes == {0}, out
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("one/1-0.json", "two/2-0.json", "two/2-1.json")
    )
    assert first == second and "sample 40 at noise level" in first["seen"][5][1]
    assert [step for step, _ in first["seen"]] == [step for step, _ in one["seen"]]
    assert torch.allclose(torch.tensor(one["weights"]), torch.tensor(first["weights"]), atol=1e-6)
    model = student()
    model.net.body[2].p = 0.0
    loss, _ = SavedStep.load(tmp_path / "two" / "diverged-000000005.safetensors").replay(Broken(torch.nan), model)
    other, _ = SavedStep.load(tmp_path / "one" / "diverged-000000005.safetensors").replay(Broken(torch.nan), model)
    assert loss.isnan().nonzero().tolist() == [[40]] and torch.allclose(loss, other, equal_nan=True, rtol=1e-4)


def test_undisturbed_training_is_the_same_with_and_without_a_guard():
    models = [run(1.0, rollbacks=most)[0] for most in (0, 2)]
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_on_a_device_that_is_read_seldom_the_first_bad_step_freezes_training_until_then(tmp_path, monkeypatch, value):
    """1000 steps are read 50 times. The fused optimizer leaves out the steps between, and the file holds the weights before the first."""
    monkeypatch.setattr(training, "waits", lambda device: True)
    o = Optimization(images=1000 * 64, batch_size=64, lr=0.01)
    healthy, _ = run(1.0, step=43, o=o, stop=43)
    states = run(value, step=43, o=o, resumable=Resumable(tmp_path), save_every_images=20 * 64, stop=80)[1]
    (text,) = [state.rollback for state in states if state.rollback]
    assert text.startswith("step 43 of phase p: ") and level_of(43, 5) in text and "back to step 40" in text
    assert [state.step for state in states[:61]] == [*range(1, 60), 41, 42]  # 43 to 59 were frozen, 60 was read
    saved = SavedStep.load(next(tmp_path.glob("diverged-*")))
    assert all(torch.equal(saved.tensors[f"net.{name}"], p) for name, p in healthy.net.state_dict().items())
    assert not [
        p.name
        for p in Resumable(tmp_path)._paths()
        if not all(v.isfinite().all() for k, v in files.load(p)[0].items() if "norms" not in k)
    ]


def scaled(monkeypatch):
    """An accelerator with the gradient scaler of fp16, which Accelerate gives to GPUs only; the network computes in float32."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**100), True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    monkeypatch.setattr(training, "waits", lambda device: True)
    return accelerator


def test_a_gradient_scaler_skips_overflows_and_a_loss_that_is_not_finite_rolls_back(tmp_path, monkeypatch):
    """A scale of 2^100 overflows in the first steps: the scaler lowers it, and nobody calls that a divergence."""

    @dataclass(frozen=True)
    class Huge(Broken):
        def __call__(self, student, x0, **kwargs):
            return super().__call__(student, x0, **kwargs) * 2.0**30

    accelerator = scaled(monkeypatch)
    stream, o = poisoned(BatchSplit(64), 43, 5), Optimization(images=100 * 64, batch_size=64, lr=0.01)
    options = {"resumable": Resumable(tmp_path), "save_every_images": 20 * 64}
    model = student()
    states, scales = [], []
    for state in train(Huge(torch.nan), model, stream, accelerator, o, seed=0, phase="p", **options):
        states.append(state)
        scales.append(accelerator.scaler.get_scale())
    (back,) = [i for i, state in enumerate(states) if state.rollback]
    text = states[back].rollback
    assert text.startswith("step 43 of phase p: the loss of sample 5") and "rollback 1 of at most 2" in text
    assert not states[0].grad_norm.isfinite() and states[-1].grad_norm.isfinite() and weights(model).isfinite().all()
    assert scales[back] == 2.0**99 > scales[back - 1] > 1 and scales[-1] < 2.0**98  # it began anew, and fell again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts synchronisations of a GPU")
def test_no_step_between_two_reads_waits_for_the_gpu():
    x, o = torch.randn(64, 2, device="cuda"), Optimization(images=500 * 64, batch_size=64, ema_halflife_images=200)
    states = train(Broken(1.0), student(), lambda step: repeat((x, {})), Accelerator(), o, seed=0, phase="p")
    for _ in range(10):  # steps 10, 20, ... are read
        next(states)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            next(states)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SMALL = "--threads 1 --preset smoke --images 40 --chunk 20 --sweep-steps 1 --start-steps 2 --images-per-stage 256".split()  # noqa: SIM905


def exits(main, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


@pytest.mark.slow
def test_a_stage_that_diverges_ends_with_one_line_and_exit_code_2_and_its_step_is_replayed(tmp_path, capsys, monkeypatch):
    """From progress 1/2 on, the sample of the highest noise level has an infinite loss."""
    healthy = Progressive.__call__

    def broken(self, student, x0, **kwargs):
        loss = healthy(self, student, x0, **kwargs)
        return torch.where((torch.arange(len(loss)) == 7) & (kwargs["progress"] >= 0.5), torch.inf, loss)

    monkeypatch.setattr(Progressive, "__call__", broken)
    run = [*SMALL, "--batch-size", 32, "--rollbacks", 1, "--output-dir", tmp_path / "r"]
    code, out, err = exits(progressive.main, run, capsys)
    assert (
        code == 2 and err.count("error: ") == 1 and err.strip().splitlines()[-1].startswith("error: training diverged after 1 ")
    )
    assert "step 8 of phase 1: the loss of sample 7 at noise level" in err
    steps = [line["step"] for line in map(json.loads, (tmp_path / "r/metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps))  # no line is written twice
    saved = tmp_path / "r/stages/1/diverged-000000008.safetensors"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    code, out, err = exits(progressive.main, [*run, "--replay", saved], capsys)
    rows = [line.split() for line in out.splitlines() if line.strip() and line.split()[0].isdigit() and len(line.split()) == 3]
    assert code == 0 and len(rows) == 32 and rows[7][2] == "inf" and all(row[2] != "inf" for row in rows[:7] + rows[8:])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")} == before
    assert exits(progressive.main, [*run, "--replay", tmp_path / "r/config.json"], capsys)[0] == 2
    monkeypatch.setattr(Progressive, "__call__", healthy)
    progressive.main([*map(str, run), "--rollbacks", "2"])  # more rollbacks are no other run
    assert (tmp_path / "r/report.html").exists()


def test_numbers_that_are_not_finite_in_weights_and_data_are_found_before_training(tmp_path, capsys, teacher):
    net = copy.deepcopy(teacher.denoiser.net)
    with torch.no_grad():
        next(iter(net.parameters()))[0, 0] = torch.nan
    teachers.save(tmp_path / "nan.safetensors", replace(teacher, denoiser=replace(teacher.denoiser, net=net)))
    for main in (progressive.main, consistency.main):
        code, _, err = exits(main, ["--teacher", tmp_path / "nan.safetensors", "--output-dir", tmp_path / "r"], capsys)
        assert code == 2 and "numbers of the model's unet.conv_in.weight are not finite" in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()
    latents = torch.zeros(5000, 4, 2, 2)
    latents[4500, 1, 0, 1] = -torch.inf
    with pytest.raises(ValueError, match="some: sample 4500 is not finite"):
        check_finite_data(Data("some", latents, latents={}))
