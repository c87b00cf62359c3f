"""Sampling and decoding are timed apart, in the rounds of a report."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from distill.sampling import Sampling
from eval import timing
from eval.cells import Cell, Protocol
from teachers.codec import Codec

SECONDS = {"sampling": 3.0, "decoding": 0.5, "pixels": 2.0}  # of a batch


def test_the_times_of_a_latent_model_are_those_of_sampling_and_of_decoding_and_are_kept(teacher, tmp_path, monkeypatch):
    now = [0.0]

    def takes(what):
        now[0] += SECONDS[what]

    latent = replace(teacher, codec=Codec(torch.nn.Module(), 1.0))
    cells = [Cell("a", "teacher", latent, Sampling(), 2), Cell("b", "teacher", teacher, Sampling(), 3)]
    monkeypatch.setattr(Codec, "decode", lambda self, z: takes("decoding"))
    monkeypatch.setattr(timing, "generate", lambda d, s, times, *_: takes("sampling" if len(times) == 3 else "pixels"))
    monkeypatch.setattr(timing, "clock", lambda device: now[0])
    protocol = Protocol(40, 0, 16, "digits", "", "", 1, "")

    def rows():
        found = timing.timed(cells, [{"name": cell.name} for cell in cells], protocol, Accelerator(cpu=True), tmp_path)
        return [{key: row[key] * 16 for key in row if key.endswith("per_image")} for row in found]

    expected = [{"seconds_per_image": 3.0, "decode_seconds_per_image": 0.5}, {"seconds_per_image": 2.0}]
    assert rows() == [pytest.approx(row) for row in expected]
    monkeypatch.setattr(timing, "rounds", lambda *_: pytest.fail("timed again"))
    assert rows() == [pytest.approx(row) for row in expected]
