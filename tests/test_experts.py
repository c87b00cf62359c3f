from dataclasses import replace

import torch
from conftest import refuses

import teachers
from distill.denoiser import Rescheduled
from distill.schedule import Cosine, Flow
from teachers.experts import Experts
from teachers.oracle import Gaussian

BASE = Gaussian(Cosine(), torch.tensor([0.5, -0.2]), torch.tensor([0.4, 0.7]))
REFINER = replace(BASE, mean=-BASE.mean)


def test_every_sample_is_evaluated_by_the_expert_of_its_noise_level():
    both = Experts(Cosine(), (BASE, REFINER), (1.0,))
    t = torch.linspace(0.01, 0.99, 40)
    x, noisy = torch.randn(40, 2), Cosine().logsnr(t) <= 1.0
    out = both(x, t)
    assert torch.equal(out[noisy], BASE(x, t)[noisy]) and torch.equal(out[~noisy], REFINER(x, t)[~noisy])
    assert 5 < noisy.sum() < 35 and torch.equal(both(x, t[0]), REFINER(x, t[0]))


def test_an_expert_of_another_schedule_is_evaluated_in_its_own():
    elsewhere = Rescheduled(REFINER, Flow())
    t, x = torch.linspace(0.01, 0.99, 20), torch.randn(20, 2)
    same, other = (Experts(Cosine(), (BASE, refiner), (0.0,)) for refiner in (REFINER, elsewhere))
    assert torch.allclose(same(x, t), other(x, t), atol=1e-5)


def test_conditions_are_cut_to_the_rows_of_each_expert(teacher):
    both = Experts(teacher.denoiser.schedule, (teacher.denoiser, teacher.denoiser), (0.0,))
    x, t, labels = torch.randn(6, 1, 8, 8), torch.linspace(0.05, 1.0, 6), torch.arange(6)
    assert torch.allclose(both(x, t, labels=labels), teacher.denoiser(x, t, labels=labels), atol=1e-5)


def test_a_spec_gives_the_experts_and_the_bounds_between_them():
    model = teachers.load("experts:digits|digits,logsnr=-1")
    assert model.classes == 10 and model.shape == (1, 8, 8) and model.denoiser.logsnr == (-1.0,)
    for wrong, message in (
        ("experts:digits|digits,logsnr=1,0", "accepted is experts:SPEC"),
        ("experts:digits|digits", "accepted is experts:SPEC"),
        ("experts:digits|oracle:gaussian,logsnr=0", "the first expert has"),
        ("experts:digits|nothing,logsnr=0", "unknown model 'nothing'"),
    ):
        refuses(message, teachers.load, wrong)
