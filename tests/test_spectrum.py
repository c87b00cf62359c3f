"""Power spectra against Parseval's theorem, white noise, and the Wiener filter of a stationary Gaussian process."""

from dataclasses import dataclass

import pytest
import torch
from conftest import here

from distill.reading import read_json
from distill.schedule import Cosine, Schedule, expand
from eval.spectrum import error, power, rings
from recipes import spectrum


def rng():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (6, 10)])
def test_the_spectrum_keeps_the_energy_of_images(size):
    x = torch.randn(5, 3, *size, generator=rng()).double() + 0.5
    shares = rings(*size).flatten().bincount() / (size[0] * size[1])
    assert float((power(x) * shares).sum()) == pytest.approx(float(x.square().mean()), rel=1e-6)


def test_white_noise_is_flat_and_a_wave_is_in_its_own_ring():
    noise = 2 * torch.randn(4000, 1, 8, 8, generator=rng())
    torch.testing.assert_close(power(noise), torch.full((7,), 4.0).double(), rtol=0.05, atol=0)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(8) / 8).expand(1, 1, 8, 8)
    assert power(wave).argmax() == 3 and float(power(wave).sum()) == pytest.approx(float(power(wave)[3]))


@dataclass(frozen=True)
class Wiener:
    """E[x0 | x_t] of a stationary Gaussian process whose power is ``of`` [H, W]."""

    schedule: Schedule
    of: torch.Tensor

    def __call__(self, x_t, t, to=None, **cond):
        a, s = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        return torch.fft.ifft2(torch.fft.fft2(x_t) * a * self.of / (a * a * self.of + s * s)).real


def test_the_error_of_a_stationary_process_is_that_of_the_wiener_filter():
    ring = rings(8, 8)
    of = 4.0 / (1 + ring.double() ** 2)
    white = torch.randn(4000, 1, 8, 8, generator=rng(), dtype=torch.float64)
    x0 = torch.fft.ifft2(torch.fft.fft2(white) * of.sqrt()).real
    signal = 4.0 / (1 + torch.arange(7).double() ** 2)
    torch.testing.assert_close(power(x0), signal, rtol=0.05, atol=0)
    logsnr = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    noise = (-logsnr).exp()[:, None]
    found = error(Wiener(Cosine(), of), x0, logsnr, rng())
    torch.testing.assert_close(found, signal * noise / (signal + noise), rtol=0.05, atol=0)


@pytest.mark.slow
def test_the_recipe_compares_students_with_their_teacher(ladder, tmp_path, capsys):
    here(spectrum.main, "--preset smoke --student", ladder, "--output-dir", tmp_path / "out")
    out = read_json(tmp_path / "out" / "spectrum.json")
    assert [student["steps"] for student in out["students"]] == [2, 1]
    assert len(out["unknown"]) == 6 and len(out["unknown"][0]) == len(out["data"]) == 7
    first = out["students"][0]
    assert first["ratio"][2] == pytest.approx(first["power"][2] / out["teacher"]["power"][2])
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 1000 and "power / teacher's" in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_beside_itself_loses_no_frequency(tmp_path, capsys):
    here(spectrum.main, "--preset smoke --student digits --output-dir", tmp_path / "out")
    (itself,) = read_json(tmp_path / "out" / "spectrum.json")["students"]
    assert itself["ratio"] == [1.0] * 7
