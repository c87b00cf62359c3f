"""The host fetches the results of a chunk when the next one is queued, and waits once per chunk."""

from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from fake_cuda import CUDA
from test_device import pretended

import teachers
from distill.sampling import Sampling
from eval import sweep as sweeping
from eval.behind import one_behind
from eval.cells import Cell, Protocol
from eval.features import Extractor
from eval.metrics import Reference
from eval.reference import extract
from eval.sweep import sweep

IMAGES = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    number: int
    here: torch.Tensor
    there: torch.Tensor
    none: torch.Tensor | None = None


def logged(gpu, log):
    """Append each wait of the host to ``log``."""
    wait = gpu._wait
    gpu._wait = lambda what, *args: (log.append(what), wait(what, *args))


def results(device, log):
    for i in range(3):
        log.append(f"make {i}")
        yield Result(i, torch.tensor([i]), torch.full((2,), i, device=device))


def test_a_chunk_is_fetched_after_the_next_one_is_queued_and_in_order():
    log = []
    with pretended() as gpu:
        logged(gpu, log)
        for result in one_behind(results(CUDA, log)):
            assert not result.there.is_cuda and result.none is None
            assert torch.equal(result.here, torch.tensor([result.number]))
            assert torch.equal(result.there, torch.full((2,), result.number))
            log.append(f"use {result.number}")
    assert log == ["make 0", "make 1", "event", "use 0", "make 2", "event", "use 1", "event", "use 2"]


def test_results_on_the_cpu_are_not_held_back():
    log = []
    for result in one_behind(results("cpu", log)):
        log.append(f"use {result.number}")
    assert log == ["make 0", "use 0", "make 1", "use 1", "make 2", "use 2"]


def row_of(model, sampler, device, folder):
    """The row of one cell of three chunks, the last of which is not whole."""
    extractor, accelerator = Extractor.create("digits").to(device), Accelerator(cpu=device.type == "cpu")
    reference = Reference(extract(IMAGES, extractor, 32, accelerator))
    protocol = Protocol(70, 0, 32, "digits", "", "", len(IMAGES), "")
    cell = Cell("m", "teacher", model.to(device), Sampling(sampler), 2)
    return sweep([cell], protocol, extractor, reference, accelerator, folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "consistency"])
def test_a_sweep_waits_once_per_chunk_when_the_next_is_queued_and_measures_what_a_cpu_does(monkeypatch, tmp_path, sampler):
    monkeypatch.setattr(sweeping, "timed", lambda cells, rows, *_: rows)
    expected, log, run = row_of(teachers.load("digits"), sampler, CPU, tmp_path / "cpu"), [], Sampling.run

    def recorded(self, denoiser, x, *args, **kwargs):
        log.extend(["generate"] * (len(x) == 32))  # and not where arithmetic is compared
        return run(self, denoiser, x, *args, **kwargs)

    monkeypatch.setattr(Sampling, "run", recorded)
    with pretended() as gpu:
        logged(gpu, log)
        row = row_of(teachers.load("digits"), sampler, CUDA, tmp_path / "gpu")
    begin = log.index("generate")
    assert log[begin : begin + 6] == ["generate", "generate", "event", "generate", "event", "event"]
    for key in ("fid", "fid_interval", "nfe", "saturated_pixels", "agreement", "labels_asked"):
        assert row[key] == pytest.approx(expected[key], rel=1e-6)


def test_features_of_stored_images_are_fetched_one_chunk_behind(monkeypatch):
    log, on_device = [], Extractor.on_device
    monkeypatch.setattr(Extractor, "on_device", lambda self, x: (log.append("extract"), on_device(self, x))[1])
    here = extract(IMAGES, Extractor.create("digits"), 32, Accelerator(cpu=True))
    with pretended() as gpu:
        extractor, accelerator = Extractor.create("digits").to(CUDA), Accelerator()
        log.clear()
        gpu.reset()
        logged(gpu, log)
        there = extract(IMAGES, extractor, 32, accelerator)
        assert log == ["extract", "extract", "event", "extract", "event", "event"] and not gpu.pageable
    assert torch.equal(here, there)


def test_an_image_that_is_not_finite_is_named_although_the_next_chunk_is_queued(monkeypatch, tmp_path):
    monkeypatch.setattr(sweeping, "timed", lambda cells, rows, *_: rows)
    decode = teachers.Teacher.decode

    def broken(self, x):
        x = decode(self, x).clone()
        x[5] = torch.nan
        return x

    monkeypatch.setattr(teachers.Teacher, "decode", broken)
    with pretended():
        row = row_of(teachers.load("digits"), "ddim", CUDA, tmp_path)
    assert row["error"] == "image 5 of cell 'm ddim 2' is not finite"
