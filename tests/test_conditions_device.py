"""Conditions on a pretended GPU: rows stay on the CPU and reach the device without a wait, and encoders run on the device."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import words
from pipelines import PROMPTS, sd
from test_device import CUDA, pretended, waits

import teachers
from distill.sampling import Sampling
from distill.train import BatchSplit
from eval.generate import images
from recipes import latents
from recipes.common.checks import conditioned
from recipes.data import batches, sets
from recipes.data.sets import Data
from teachers.conditions import Conditions, Rows
from teachers.encoder import Encoder, online

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", [0.0, 1.0], ids=["sent", "resident"])
def test_the_rows_of_a_batch_are_sent_to_a_gpu_and_nothing_waits_for_them(monkeypatch, teacher, part):
    monkeypatch.setattr(batches, "RESIDENT", part)
    rows = torch.randn(6, 5, 3).half()
    table = Conditions.of({"text": Rows([rows[:2], rows[2:5], rows[5:]])})
    model = replace(teacher, classes=5, null=5, embeddings=table)
    data = Data("d", torch.randn(20, 4, 8, 8), torch.arange(20) % 5, latents={})
    arguments = (BatchSplit(8), 0, "p")
    expected = list(islice(data.batches(*arguments, CPU, model.condition, 5, 0.3)(0), 4))
    with pretended() as gpu:
        made = data.batches(*arguments, CUDA, model.condition, 5, 0.3)(0)
        found = [next(made)]
        gpu.reset()
        found += islice(made, 3)
        assert not waits(gpu) and not gpu.pageable
        for (x0, cond), (theirs, others) in zip(found, expected, strict=True):
            assert cond["text"].is_cuda and cond["text"].dtype == torch.float32
            assert torch.equal(cond["text"].cpu(), others["text"]) and torch.equal(x0.cpu(), theirs)
        made.close()


@pytest.mark.slow
def test_a_text_model_encodes_and_generates_on_the_device(tmp_path):
    with pretended():
        sd(tmp_path / "words").save_pretrained(tmp_path / "sd")
        made = np.zeros((6, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "set.npz", images=made, captions=[PROMPTS[i % 3] for i in range(6)])
        latents.main(words("--model", tmp_path / "sd", "--data", tmp_path / "set.npz", "--output-dir", tmp_path / "l"))
        model, data = conditioned(teachers.load(str(tmp_path / "sd")), sets.load(str(tmp_path / "l")))
        model.to(CUDA)
        live = model.with_conditions(online(Encoder(str(tmp_path / "sd"), device=CUDA), PROMPTS))
        assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
        drawn = [next(images(m, Sampling(), 2, [range(3)], 0, CUDA, denoiser=m.guided(2.0))).images for m in (model, live)]
        assert drawn[0].is_cuda and torch.allclose(drawn[0].cpu(), drawn[1].cpu(), atol=0.02)
