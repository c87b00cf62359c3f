"""The forecast of a run: how it is measured, how stages correct it, and that it counts the work of a small run."""

import re

import pytest
import torch
from conftest import here

from recipes import progressive
from recipes.common import forecast, training
from recipes.common.forecast import Forecast, seconds_of
from teachers.networks.unet import UNet

CPU = torch.device("cpu")


@pytest.fixture
def by_hand(monkeypatch):
    """A list of one number, the time that `forecast` sees."""
    now = [0.0]
    monkeypatch.setattr(forecast, "clock", lambda device: now[0])
    return now


@pytest.mark.parametrize("seconds, calls, made", [(0.0625, 10_000, 8), (0.0625, 100, 4), (0.0625, 10, 2), (5.0, 10_000, 2)])
def test_a_call_is_measured_for_less_than_half_a_second_or_a_fiftieth_of_the_run(by_hand, seconds, calls, made):
    count = []

    def work():
        count.append(1)
        by_hand[0] += seconds if len(count) > 1 else 60.0  # the first call warms up

    assert seconds_of(work, CPU, calls) == pytest.approx(seconds)
    assert len(count) == made


def test_what_is_left_follows_the_images_and_the_rate_of_the_stages(by_hand):
    run = Forecast(training=100.0, sweep=30.0, images=1000, device=CPU, ending=10.0)
    assert run.total == 140
    assert run.left(200, rate=8.0) == 800 / 8 + 40
    run.done = 900
    assert run.left(100, 8.0) == 40 == run.left(500, 8.0)  # a stage that is trained again
    by_hand[0] = 150.0
    assert run.outcome() == "took 2.5 min, forecast 2.3 min"


def test_a_run_says_what_it_took_beside_its_forecast_and_what_is_left_while_it_trains(new, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "export_pipelines", lambda run, model: None)
    flags = (
        "--preset smoke --start-steps 2 --images-per-stage 64 --batch-size 16 --images 40 --chunk 40 --sweep-steps 1 --force"
    )
    shown = []
    monkeypatch.setattr(Forecast, "left", lambda self, images, rate: shown.append((images, self.done)) or 1.0)
    arguments = ("--teacher", new, flags, "--output-dir", tmp_path / "run")
    here(progressive.main, *arguments)
    said = r"^took \S+ s, forecast \S+ s$"
    assert re.search(said, capsys.readouterr().out, re.M)
    assert (128, 0) in shown
    here(progressive.main, *arguments)  # finished before it began: nothing to compare
    assert not re.search(said, capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_the_forecast_of_a_small_run_counts_the_work_of_its_network(new, tmp_path, monkeypatch):
    work, took = [0], []
    forward = UNet.forward

    def counted(self, x, *rest, **more):
        """Count samples; with gradients a call costs three of those without."""
        work[0] += len(x) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, x, *rest, **more)

    def outcome(self):
        took.append((work[0] - self.began, self.training + self.sweep))
        return ""

    monkeypatch.setattr(UNet, "forward", counted)
    monkeypatch.setattr(forecast, "clock", lambda device: float(work[0]))
    monkeypatch.setattr(Forecast, "outcome", outcome)
    monkeypatch.setattr(training, "export_pipelines", lambda run, model: None)
    flags = "--start-steps 4 --images-per-stage 256 --batch-size 32 --images 200 --chunk 20 --sweep-steps 2 --force"
    here(progressive.main, "--teacher", new, flags, "--output-dir", tmp_path / "run")
    ((truth, foretold),) = took
    assert 0.95 < foretold / truth < 1.05, (foretold, truth)
