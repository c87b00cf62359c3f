from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distill import grid
from distill.denoiser import Guided
from distill.schedule import EDM, Table
from distill.solver import SAMPLERS
from eval.generate import chunks, counted, generate, start, to_uint8
from teachers.codec import Codec
from teachers.oracle import Gaussian
from teachers.unet import with_two_times


@pytest.mark.parametrize("images, size, world", [(100, 32, 1), (100, 32, 3), (7, 10, 4), (64, 8, 5)])
def test_whole_chunks_of_all_processes_cover_every_index_once(images, size, world):
    shared = [i for rank in range(world) for chunk in chunks(images, size, rank, world) for i in chunk]
    assert sorted(shared) == list(range(-(-images // size) * size))
    assert all(len(chunk) == size for rank in range(world) for chunk in chunks(images, size, rank, world))


def test_an_index_starts_from_the_same_noise_and_label_in_any_chunk():
    whole, part = start(range(10), (1, 8, 8), 10, seed=3), start([7, 2], (1, 8, 8), 10, seed=3)
    assert torch.equal(whole.noise[[7, 2]], part.noise) and torch.equal(whole.labels[[7, 2]], part.labels)
    assert torch.equal(whole.noise, start(range(10), (1, 8, 8), None, seed=3).noise)
    assert not torch.equal(whole.noise, start(range(10), (1, 8, 8), 10, seed=4).noise)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_an_image_does_not_depend_on_its_neighbours(teacher, sampler):
    times = grid.uniform(teacher.denoiser.schedule, 4)
    images = [
        generate(teacher.denoiser, sampler, times, start(r, teacher.shape, 10, 0), teacher.condition, torch.device("cpu"))
        for r in (range(6), range(4, 6))
    ]
    assert torch.allclose(images[0][4:], images[1], atol=1e-5)


def test_noise_is_standard_and_labels_are_uniform():
    begin = start(range(2000), (1, 8, 8), 10, seed=0)
    assert abs(begin.noise.mean()) < 0.01 and abs(begin.noise.std() - 1) < 0.01
    assert (torch.bincount(begin.labels) - 200).abs().max() < 60


@pytest.mark.parametrize("scale, doubled", [(1.0, 1), (2.0, 2)])
def test_nfe_is_counted_at_the_network_so_guidance_doubles_it(teacher, scale, doubled):
    count = [0]
    denoiser = counted(Guided(teacher.denoiser, {"labels": torch.tensor([10])}, scale), count)
    begin = start(range(3), teacher.shape, 10, 0)
    generate(denoiser, "heun", grid.karras(denoiser.schedule, 4), begin, teacher.condition, torch.device("cpu"))
    heun_calls = 2 * 4 - 2  # from zero terminal SNR the first step is an Euler one too
    assert count[0] / 3 == heun_calls * doubled


def test_pixels_are_rounded_to_the_nearest_and_clamped():
    x = torch.tensor([-2.0, -1.0, -1 + 1 / 255, 0.0, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 1 if (1 / 255) * 127.5 > 0.5 else 0, 128, 255, 255]
    assert torch.equal(to_uint8(torch.arange(256) / 127.5 - 1), torch.arange(256, dtype=torch.uint8))


def test_every_sampler_is_reachable_by_name(teacher):
    begin = start(range(2), teacher.shape, 10, 0)
    teacher = with_two_times(teacher)
    for name in [*SAMPLERS, "consistency:0.3"]:
        times = grid.uniform(teacher.denoiser.schedule, 3)
        out = generate(teacher.denoiser, name, times, begin, teacher.condition, torch.device("cpu"))
        assert out.shape == (2, 1, 8, 8) and torch.isfinite(out).all()


class Latents(torch.nn.Module):
    """An autoencoder under diffusers' interface: images are latents repeated 2 x 2, plus one."""

    def decode(self, z):
        assert z.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return SimpleNamespace(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3) + 1)

    def encode(self, images):
        return SimpleNamespace(latents=images[:, :, ::2, ::2] - 1)


def test_latents_are_decoded_in_float32_by_the_scale_and_shift_of_their_codec(teacher):
    codec = Codec(Latents(), scale=2.0, shift=0.5)
    latents = torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = codec.decode(latents.bfloat16())
    z = latents.bfloat16().float() / 2 + 0.5
    assert images.shape == (3, 1, 16, 16) and torch.equal(images[:, :, ::2, ::2], z + 1)
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-6)
    assert replace(teacher, codec=codec).image_shape == (1, 16, 16) and teacher.image_shape == (1, 8, 8)


def test_sampling_starts_from_unit_noise_on_any_table_as_its_pipelines_do_and_from_sigma_elsewhere():
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    table, seen = Table(tuple(alphas_cumprod.tolist())), []  # of Stable Diffusion: sigma is 0.9977 at its end
    for schedule, first in ((table, 1.0), (table, 0.5), (EDM(), 80.0)):
        oracle = Gaussian(schedule, torch.zeros(1, 2, 2), torch.ones(1, 2, 2))

        class Recording:
            def __init__(self, schedule):
                self.schedule = schedule

            def __call__(self, x, t, **cond):
                seen.append(x)
                return oracle(x, t)  # noqa: B023

        begin = start(range(2), (1, 2, 2), None, 0)
        times = torch.tensor([first, schedule.t_clean], dtype=torch.float64)
        generate(Recording(schedule), "ddim", times, begin, lambda labels: {}, torch.device("cpu"))
        expected = 1.0 if (schedule, first) == (table, 1.0) else float(schedule.sigma(times[0]))
        assert torch.allclose(seen[-1], expected * begin.noise)
