"""The weight of pairs, the ends of schedules, and what a run keeps and says it trains, against closed forms and counts."""

import contextlib
import gc
import io
import json
import math
import weakref
from dataclasses import dataclass

import pytest
import torch

import teachers
from distill import files
from distill.consistency import HIGHEST, Consistency, Gap, inverse_gap
from distill.distance import PseudoHuber
from distill.progressive import Progressive
from distill.rng import Rng
from distill.schedule import EDM, VE, Cosine, Flow, Table, describe, schedule_from
from distill.target import DataSample
from eval import sweep
from recipes import progressive
from recipes.common import training
from teachers.networks.unet import UNet


@dataclass(frozen=True)
class Shrunk:
    """A student that is wrong in proportion to the noise: f(x, t) = x / (1 + t)."""

    schedule: EDM

    def __call__(self, x, t, **cond):
        return x / (1 + t[:, None])


@pytest.mark.parametrize("sigma", [0.0003, 0.0015, 0.05, 1.0, 60.0])
def test_the_loss_of_ect_is_the_papers_at_its_last_stage_and_low_noise(sigma):
    """2406.14548: d(f(x_t, t), f(x_r, r)) / (t - r) with r = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), in float64."""
    schedule, x0, rng = EDM(t_min=1e-5), torch.randn(8, 3), Rng(torch.Generator().manual_seed(3), 8)
    t = torch.full((8,), sigma, dtype=torch.float64)
    r = t * (1 - 2.0 ** -(7 + 1) * (1 + 8 * torch.sigmoid(-t)))
    method = Consistency(DataSample(), lambda *_: (t.float(), r.float()), inverse_gap, PseudoHuber(1e-8))
    loss = method(Shrunk(schedule), x0, rng=rng, progress=1.0)
    eps = Rng(torch.Generator().manual_seed(3), 8).normal(x0).double()
    f_t, f_r = ((x0.double() + eps * level[:, None]) / (1 + level[:, None]) for level in (t, r))
    paper = (f_t - f_r).norm(dim=1) / (t - r)
    assert torch.allclose(loss.double(), paper, rtol=0.02)


@pytest.mark.parametrize("schedule", [EDM(), Cosine(), Flow(), VE(0.002)], ids=lambda s: type(s).__name__)
def test_the_gap_of_a_drawn_pair_is_resolved_at_every_noise_level(schedule):
    """The weight times the gap, computed in float64 from the times that were drawn, is 1."""
    t, s = Gap()(schedule, Rng(torch.Generator().manual_seed(0), 4096), 0.99)
    weight = inverse_gap(schedule.level(t).clamp(max=HIGHEST), schedule.level(s).clamp(max=HIGHEST))
    exact = schedule.level(t.double()).clamp(max=HIGHEST) - schedule.level(s.double()).clamp(max=HIGHEST)
    assert torch.allclose(weight.double() * exact, torch.ones(4096).double(), rtol=5e-3)


def test_a_pair_above_the_highest_level_has_a_small_finite_weight():
    assert inverse_gap(torch.tensor([HIGHEST]), torch.tensor([HIGHEST])) == pytest.approx(1 / HIGHEST)


WRONG = [
    ({"kind": "ve", "sigma_min": 1.0, "sigma_max": 0.5}, "VE with sigma_min = 1, sigma_max = 0.5: accepted is 0 < sigma_min <"),
    ({"kind": "ve", "sigma_min": 0.0}, "accepted is 0 < sigma_min < sigma_max < inf"),
    ({"kind": "ve", "sigma_max": math.inf}, "sigma_max = inf"),
    ({"kind": "ve", "sigma_min": 1.0, "sigma_max": 1.0}, "accepted is"),
    ({"kind": "edm", "t_min": 81.0}, "EDM with t_min = 81, t_max = 80: accepted is 0 < t_min < t_max < inf"),
    ({"kind": "edm", "t_min": -1.0}, "t_min = -1"),
    ({"kind": "edm", "t_max": math.nan}, "t_max = nan"),
    ({"kind": "edm", "t_min": math.nan}, "t_min = nan"),
    ({"kind": "trig", "sigma_data": 0.0}, "Trig with sigma_data = 0: accepted is 0 < sigma_data < inf"),
    ({"kind": "trig", "sigma_data": math.nan}, "sigma_data = nan"),
    ({"kind": "trig", "sigma_data": -0.5}, "sigma_data = -0.5"),
    (
        {"kind": "linear_vp", "beta_min": -0.1},
        "LinearVP with beta_min = -0.1, beta_max = 20: accepted is 0 < beta_min <= beta_max",
    ),
    ({"kind": "linear_vp", "beta_min": 0.0}, "beta_min = 0"),
    ({"kind": "linear_vp", "beta_max": 0.01}, "beta_max = 0.01"),
    ({"kind": "linear_vp", "beta_max": "a"}, "schedule linear_vp: "),
    ({"kind": "table", "alphas_cumprod": [0.5, math.nan]}, "must fall strictly"),
    ({"kind": "table", "alphas_cumprod": 3}, "schedule table: "),
    ({"kind": "table", "alphas_cumprod": ["a"]}, "schedule table: "),
]


@pytest.mark.parametrize(("description", "line"), WRONG, ids=str)
def test_a_schedule_with_ends_that_are_none_is_refused_in_one_line(description, line):
    with pytest.raises(ValueError) as caught:
        schedule_from(description)
    assert line in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("description", [
    {"kind": "linear_vp", "beta_min": 5.0, "beta_max": 5.0}, {"kind": "ve", "sigma_min": 0.01, "sigma_max": 50.0},
    {"kind": "edm", "t_min": 1e-5, "t_max": 700.0}, {"kind": "trig", "sigma_data": 1.0},
])  # fmt: skip
def test_schedules_at_the_edge_of_what_is_accepted_are_their_own_inverse(description):
    schedule = schedule_from(description)
    t = torch.linspace(schedule.t_min, schedule.t_max, 9, dtype=torch.float64)[1:-1]
    assert torch.allclose(schedule.time(schedule.logsnr(t)), t) and schedule_from(describe(schedule)) == schedule


def test_a_table_as_long_as_one_entry_is_accepted():
    assert schedule_from({"kind": "table", "alphas_cumprod": [0.5]}) == Table((0.5,))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A ladder of three stages: its folder, what it printed, and the networks alive at every step, save and cell."""
    folder, alive, networks, out = tmp_path_factory.mktemp("ladder") / "r", [], weakref.WeakSet(), io.StringIO()
    made = UNet.__init__

    def init(net, *args, **kwargs):
        networks.add(net)
        made(net, *args, **kwargs)

    def counting(of):
        def counted(*args, **kwargs):
            if len(networks) > 3:
                gc.collect()
            alive.append(len(networks))
            return of(*args, **kwargs)

        return counted

    arguments = "--threads 1 --preset smoke --images 40 --chunk 20 --sweep-steps 1 --batch-size 32 --start-steps 8".split()  # noqa: SIM905
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(UNet, "__init__", init)
        patch.setattr(Progressive, "__call__", counting(Progressive.__call__))
        patch.setattr(training.teachers, "save", counting(teachers.save))
        patch.setattr(sweep, "_measure_cell", counting(sweep._measure_cell))
        patch.setattr(training, "export_pipelines", lambda run, model: None)
        progressive.main([*arguments, "--images-per-stage", "40", "--output-dir", str(folder)])
    return folder, out.getvalue(), alive


@pytest.mark.slow
def test_a_ladder_keeps_two_networks_beside_the_trained_one_however_long_it_is(ladder):
    """The original teacher, and the stage's teacher or the student that is measured. Copies that are trained are not counted."""
    assert len(ladder[2]) > 5 + 4 + 5 and max(ladder[2]) == 2


@pytest.mark.slow
def test_a_run_says_how_many_images_it_trains_where_they_are_no_multiple_of_the_batch(ladder):
    """40 images are one batch of 32, and 80 are rounded to two."""
    folder, out, _ = ladder
    assert "training  160 images (whole batches; asked for 200) in 3 stages" in out
    assert "stage 4: 32 images" in out and "stage 1: 64 images" in out
    for stage, images in (("4", 32), ("2", 64), ("1", 64)):
        assert files.load(folder / "stages" / stage / "student.safetensors")[1]["record"]["trained_images"] == images
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["phase"] == "1"] == [32, 64]
