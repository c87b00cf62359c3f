"""The optimizer with moments of 8 bits, and checkpoints from before there was a choice."""

import importlib.util
import os
from itertools import islice

import pytest
import torch
from test_train import student, trained

from distill import files
from distill.names import OPTIMIZERS
from distill.resume import Resumable
from distill.train import Optimization
from recipes import progressive
from recipes.common.cost import ADAM

installed = importlib.util.find_spec("bitsandbytes") is not None
needed = pytest.mark.skipif(not installed, reason="bitsandbytes is not installed")


def test_every_optimizer_has_its_cost():
    assert set(OPTIMIZERS) == ADAM.keys()


@pytest.mark.skipif(installed, reason="bitsandbytes is installed")
def test_a_missing_bitsandbytes_is_named_in_one_line(refused, tmp_path):
    line = refused(progressive.main, "--optimizer adamw8bit --output-dir", tmp_path / "none")
    assert "pip install 'fewstep[adam8bit]'; accepted without it is adamw" in line and not (tmp_path / "none").exists()


def test_checkpoints_from_before_there_was_a_choice_are_continued(tmp_path):
    """Their identity names no optimizer."""
    how = Optimization(4 * 32, 32)
    list(islice(trained(student(), how, resumable=Resumable(tmp_path), save_every_images=32), 3))
    _, description = files.load(sorted(tmp_path.glob("resume-*"))[-1])
    assert description["identity"].startswith("0/p/{'images': 128, ") and "optimizer" not in description["identity"]
    assert "'ema_halflife_images': None}" in description["identity"]


@needed
def test_moments_of_8_bits_train_nearly_as_those_of_float32():
    one, two = (list(trained(student(), Optimization(512, 32, optimizer=name)))[-1].student.net for name in OPTIMIZERS)
    begin = student().net
    moved = sum((p - q).square().sum() for p, q in zip(one.parameters(), begin.parameters())).sqrt()
    apart = sum((p - q).square().sum() for p, q in zip(one.parameters(), two.parameters())).sqrt()
    assert 0 < apart < 0.5 * moved


@needed
def test_a_killed_training_with_moments_of_8_bits_continues_to_the_same_bits(tmp_path):
    wide = torch.nn.Linear(64, 128)  # smaller weights keep moments in float32

    def model():
        made = student()
        made.net.body[0] = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 32))
        made.net.body[0][1].load_state_dict(wide.state_dict())
        return made

    torch.manual_seed(0)
    how = Optimization(8 * 32, 32, optimizer="adamw8bit")
    options = {"save_every_images": 32}
    whole = list(trained(model(), how, resumable=Resumable(tmp_path / "whole"), **options))[-1].student.net
    list(islice(trained(model(), how, resumable=Resumable(tmp_path / "cut"), **options), 5))
    tensors, _ = files.load(sorted((tmp_path / "cut").glob("resume-*"))[-1])
    assert torch.uint8 in {value.dtype for name, value in tensors.items() if name.startswith("optimizer.")}
    again = list(trained(model(), how, resumable=Resumable(tmp_path / "cut"), **options))
    assert again[0].step > 1
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again[-1].student.net.parameters()))


@needed
def test_moments_of_8_bits_are_refused_where_training_is_sharded(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    line = refused(progressive.main, "--optimizer adamw8bit --output-dir", tmp_path / "none")
    assert "--optimizer adamw8bit with FSDP2, which shards: accepted with it are configs/one-gpu.yaml" in line
