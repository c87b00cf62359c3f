from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, FakeCuda

from distill import grid
from distill.denoiser import Guided
from distill.images import to_uint8
from distill.rng import seed_of
from distill.samplers import SAMPLERS
from distill.sampling import Sampling
from distill.schedule import EDM, Table
from eval import philox
from eval.generate import chunks, counted, generate, images, initial_noise
from teachers.codec import Codec
from teachers.oracle import Gaussian
from teachers.students import with_two_times

CPU = torch.device("cpu")


@pytest.mark.parametrize("n, size, world", [(100, 32, 1), (100, 32, 3), (7, 10, 4), (64, 8, 5)])
def test_whole_chunks_of_all_processes_cover_every_index_once(n, size, world):
    shared = [chunk for rank in range(world) for chunk in chunks(n, size, rank, world)]
    assert sorted(i for chunk in shared for i in chunk) == list(range(-(-n // size) * size))
    assert all(len(chunk) == size for chunk in shared)


def test_an_index_has_the_same_noise_and_label_in_any_chunk():
    whole, part = initial_noise(range(10), (1, 8, 8), 10, seed=3), initial_noise([7, 2], (1, 8, 8), 10, seed=3)
    assert torch.equal(whole.noise[[7, 2]], part.noise) and torch.equal(whole.labels[[7, 2]], part.labels)
    assert torch.equal(whole.noise, initial_noise(range(10), (1, 8, 8), None, seed=3).noise)
    assert not torch.equal(whole.noise, initial_noise(range(10), (1, 8, 8), 10, seed=4).noise)


def test_each_fresh_noise_is_the_next_draw_of_its_index_whatever_its_neighbours():
    whole, part, x = (
        initial_noise(range(10), (1, 8, 8), 10, seed=3),
        initial_noise([7, 2], (1, 8, 8), None, 3),
        torch.zeros(2, 1, 8, 8),
    )
    seen = [part.noise, part.fresh(x), part.fresh(x)]
    for a, b in zip(seen, [whole.noise, whole.fresh(x), whole.fresh(x)], strict=True):
        assert torch.equal(a, b[[7, 2]])
    assert all(not torch.equal(a, b) for a, b in combinations([*seen, *(noise.flip(0) for noise in seen)], 2))
    assert torch.equal(seen[2].flatten(1), philox.normal(torch.tensor([7, 2]), 64, 3, seed_of("image", 3)))
    assert part.fresh(x.double()).dtype == torch.float64


@pytest.mark.parametrize("indices", [range(3, 40), [8, 2**33]])
def test_a_device_makes_the_same_noise_and_labels_as_the_cpu_without_waiting(indices):
    here = initial_noise(indices, (1, 8, 8), 10, 0)
    drawn = [here.noise, here.labels, here.fresh(here.noise)]
    with FakeCuda() as gpu:
        there = initial_noise(indices, (1, 8, 8), 10, 0, CUDA)
        found = [there.noise, there.labels, there.fresh(there.noise)]
        assert all(x.is_cuda for x in found) and not gpu.syncs and not gpu.pageable
        assert not any(operator == "copy" for _, operator, _ in gpu.launches) or isinstance(indices, list)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(drawn, found, strict=True))


def test_noise_is_standard_and_labels_are_uniform():
    drawn = initial_noise(range(2000), (1, 8, 8), 10, seed=0)
    assert abs(drawn.noise.mean()) < 0.01 and abs(drawn.noise.std() - 1) < 0.01
    assert (torch.bincount(drawn.labels) - 200).abs().max() < 60


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_an_image_does_not_depend_on_its_neighbours_and_given_labels_leave_its_noise(teacher, sampler):
    whole, part = images(teacher, Sampling(sampler), 4, [range(6), [4, 5]], 0, CPU)
    assert part.index.tolist() == [4, 5] and torch.equal(part.labels, whole.labels[4:])
    assert torch.allclose(whole.images[4:], part.images, atol=1e-5) and torch.equal(part.pixels, to_uint8(part.images))
    drawn = dict(enumerate(whole.labels.tolist()))
    (same,) = images(teacher, Sampling(sampler), 4, [range(6)], 0, CPU, label_of=drawn.get)
    (other,) = images(teacher, Sampling(sampler), 4, [range(6)], 0, CPU, label_of=lambda i: (drawn[i] + 1) % 10)
    assert torch.equal(same.images, whole.images) and not torch.equal(other.images, whole.images)


@pytest.mark.parametrize("scale, doubled", [(1.0, 1), (2.0, 2)])
def test_nfe_is_counted_at_the_network_so_guidance_doubles_it(teacher, scale, doubled):
    count = [0]
    denoiser = counted(Guided(teacher.denoiser, {"labels": torch.tensor([10])}, scale), count)
    list(images(teacher, Sampling("heun", grid="karras"), 4, [range(3)], 0, CPU, denoiser=denoiser))
    heun_calls = 2 * 4 - 2  # from zero terminal SNR the first step is an Euler one too
    assert count[0] / 3 == heun_calls * doubled


def test_pixels_are_rounded_to_the_nearest_and_clamped():
    assert to_uint8(torch.tensor([-2.0, -1.0, -1 + 1 / 255, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0, 128, 255, 255]
    assert torch.equal(to_uint8(torch.arange(256) / 127.5 - 1), torch.arange(256, dtype=torch.uint8))


def test_every_sampler_generates_by_its_name(teacher):
    noise = initial_noise(range(2), teacher.shape, 10, 0)
    teacher = with_two_times(teacher)
    for name in [*SAMPLERS, "consistency:0.3"]:
        times = grid.uniform(teacher.denoiser.schedule, 3)
        out = generate(teacher.denoiser, Sampling.parse(name), times, noise, teacher.condition, CPU)
        assert out.shape == (2, 1, 8, 8) and torch.isfinite(out).all()


class Latents(torch.nn.Module):
    """An autoencoder with diffusers' interface: images are latents repeated 2 x 2, plus one."""

    def decode(self, z):
        assert z.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return SimpleNamespace(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3) + 1)

    def encode(self, images):
        return SimpleNamespace(latents=images[:, :, ::2, ::2] - 1)


def test_latents_are_decoded_in_float32_by_the_scale_and_shift_of_their_codec(teacher):
    codec = Codec(Latents(), scale=2.0, shift=0.5)
    latents = torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = codec.decode(latents.bfloat16())
    z = latents.bfloat16().float() / 2 + 0.5
    assert decoded.shape == (3, 1, 16, 16) and torch.equal(decoded[:, :, ::2, ::2], z + 1)
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-6)
    assert replace(teacher, codec=codec).image_shape == (1, 16, 16) and teacher.image_shape == (1, 8, 8)


def test_sampling_starts_from_unit_noise_on_any_table_as_its_pipelines_do_and_from_sigma_elsewhere():
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    table, seen = Table(tuple(alphas_cumprod.tolist())), []  # of Stable Diffusion: sigma is 0.9977 at its end

    class Recording(Gaussian):
        def __call__(self, x, t, to=None, **cond):
            seen.append(x)
            return super().__call__(x, t)

    for schedule, first in ((table, 1.0), (table, 0.5), (EDM(), 80.0)):
        noise = initial_noise(range(2), (1, 2, 2), None, 0)
        times = torch.tensor([first, schedule.t_clean], dtype=torch.float64)
        oracle = Recording(schedule, torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
        generate(oracle, Sampling(), times, noise, lambda labels: {}, CPU)
        expected = 1.0 if (schedule, first) == (table, 1.0) else float(schedule.sigma(times[0]))
        assert torch.allclose(seen[-1], expected * noise.noise)
