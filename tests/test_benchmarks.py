"""The benchmarks: ratios in turn, the passes that a step is compared with, peers that calculate the same, and no slower step."""

import json
import math
import time

import pytest
import torch
from conftest import words

from benchmarks import check, evaluation, peer_training, processes, run, training
from benchmarks.networks import digits
from benchmarks.turns import Ratio, in_turn, interval

CPU = torch.device("cpu")


class Ticks:
    """A clock that works move on by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        turns = iter(seconds)

        def step():
            self.now += next(turns)

        return step


def test_a_ratio_is_the_median_over_turns_after_one_of_warm_up():
    clock = Ticks()
    row = in_turn("r", clock.work(9, 3, 3, 30), clock.work(9, 9, 2, 2, 1, 1, 5, 5), 3, clock, 1.5)
    assert (row.ratio, row.floor, row.turns, row.seconds) == (3.0, 0.0, 3, 2.0)


def test_the_floor_is_how_far_the_same_work_is_from_itself():
    clock = Ticks()
    row = in_turn("r", clock.work(1, 1, 1), clock.work(1, 1, 2, 3, 4, 4), 2, clock)
    assert row.floor == 0.5


def test_the_interval_of_a_median_covers_it_in_95_of_100_samples():
    draws = torch.randn(4000, 15, generator=torch.Generator().manual_seed(0)).exp().tolist()
    covered = sum(low <= 1 <= high for low, high in map(interval, draws)) / len(draws)
    assert 0.95 <= covered <= 0.98
    assert interval([3, 1, 2]) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", training.PASSES)
def test_a_step_makes_the_network_calls_that_it_is_compared_with(name):
    network = digits()
    network = type(network)(network.model, network.data, 4)
    found = {"teacher": 0, "student": 0, "tangents": 0, "trained": 0}

    def counting(student):
        def hook(net, inputs):
            dual = any(torch._C._functorch.is_gradtrackingtensor(x) or _is_dual(x) for x in inputs)
            found[
                "tangents"
                if dual
                else "trained"
                if torch.is_grad_enabled() and student
                else "student"
                if student
                else "teacher"
            ] += 1

        return hook

    student, method = training.built(name, network.model, network.data)
    network.model.parametric.net.register_forward_pre_hook(counting(False))
    student = type(student)(**vars(student) | {"denoiser": student.student()})
    student.denoiser.net._forward_pre_hooks.clear()
    student.denoiser.net.register_forward_pre_hook(counting(True))
    step = training.steps(method, student, network, CPU)
    step()
    assert found == vars(training.PASSES[name]) | {"trained": 1}


def _is_dual(x):
    return torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


@pytest.mark.slow
def test_the_plain_loop_has_the_loss_of_progressive_distillation():
    assert peer_training.difference(digits()) < 1e-5


@pytest.mark.slow
def test_the_samplers_of_diffusers_make_the_same_images():
    from benchmarks import peer_samplers

    rows = [row for row in peer_samplers.rows("digits", digits(), 1, time.process_time, CPU, (2,)) if isinstance(row, Ratio)]
    assert {name for row in rows for name in row.name.split() if name in peer_samplers.SCHEDULERS} == set(
        peer_samplers.SCHEDULERS
    )
    assert all(row.difference < peer_samplers.SAME for row in rows)


@pytest.mark.slow
def test_the_peers_of_evaluation_have_the_same_fid():
    rows = [row for row in evaluation.peers(1, time.process_time, CPU, 256) if isinstance(row, Ratio)]
    assert rows and all(row.difference < 1e-5 for row in rows)
    seconds, _, difference = evaluation.arithmetic(time.process_time, 32)
    assert seconds.value > 0 and difference.value < 1e-6


@pytest.mark.slow
def test_a_step_holds_little_more_memory_than_weights_and_activations():
    assert 0.5 < processes.memory("digits", "progressive").value < 5


@pytest.mark.slow
def test_the_command_writes_its_rows_and_a_plot_and_overwrites_nothing(tmp_path, refused):
    flags = f"--preset smoke --output-dir {tmp_path / 'b'}"
    run.main(words(flags))
    found = json.loads((tmp_path / "b/benchmarks.json").read_text())
    assert found["about"]["threads"] == 1 and found["rows"][0]["name"] == "digits ect"
    assert all(math.isfinite(row.get("ratio", 1.0)) for row in found["rows"])
    assert (tmp_path / "b/benchmarks.png").stat().st_size > 1000
    assert "exists: name another --output-dir" in refused(run.main, flags)


# -- no slower than before --------------------------------------------------------------------------------------------------------
def test_a_ratio_is_worse_beyond_a_quarter_and_the_floor_alone():
    rows = [Ratio("a", 1.34, 0.1, 7, 1.0), Ratio("b", 1.36, 0.1, 7, 1.0), Ratio("new", 9.0, 0.0, 7, 1.0)]
    assert check.worse(rows, {"a": 1.0, "b": 1.0}) == ["b: 1.360, stored 1.000, accepted <= 1.350"]


@pytest.mark.slow
def test_a_doubled_step_is_worse_than_the_stored_one(monkeypatch):
    honest = training.steps

    def doubled(*arguments):
        step = honest(*arguments)
        return lambda: (step(), step())

    monkeypatch.setattr(training, "steps", doubled)
    stored = json.loads(check.STORED.read_text())
    (row,) = training.rows("digits", digits(), ("ect",), 3, time.process_time, CPU, False)
    assert len(check.worse([row], stored)) == 1


@pytest.mark.slow
def test_no_ratio_is_worse_than_the_stored_one():
    assert check.compare() == []


def test_the_stored_ratios_are_those_that_are_measured():
    stored = json.loads(check.STORED.read_text())
    samplers = {f"digits {name}, batch {batch}" for name in ("ddim", "unipc") for batch in (64, 1)}
    assert stored.keys() == {*(f"digits {name}" for name in check.METHODS), *samplers, "digits extraction"}
    assert all(0.5 < ratio < 2 for ratio in stored.values())
