"""Class agreement of text-to-image models: the class that the extractor sees, against the label of the images with this caption."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import here, rows

from distill import files
from eval.collect import AllFeatures
from eval.features import Extractor
from eval.generate import initial_noise
from eval.metrics import Features, Reference
from recipes import evaluate, text_teacher
from recipes.data import sets
from recipes.data.condition_shards import distinct
from recipes.data.sets import Data
from teachers.digits import captions


def captioned(labels, texts):
    return Data("some", torch.zeros(len(texts), 1, 8, 8, dtype=torch.uint8), labels, texts)


def test_a_caption_has_the_class_of_its_images_before_and_after_captions_become_labels():
    data = captioned(torch.tensor([1, 0, 1, 2, 0]), ["one", "nil", "one ", "mixed", "mixed"])
    assert data.caption_classes == {"one": 1, "nil": 0}
    after = data.captioned(["mixed", "nil", "one"])
    assert after.labels.tolist() == [2, 1, 2, 0, 0] and after.caption_classes == {"one": 1, "nil": 0}
    assert captioned(None, ["one"]).caption_classes == {} == replace(data, captions=None).caption_classes
    assert captioned(None, ["one"]).captioned(["one"]).caption_classes == {}


def counted(wanted, classes, labels, seen):
    """The class entries of a cell of images with these labels, in which the extractor sees these of three classes."""
    made = Features(torch.randn(len(labels), 4), torch.eye(3)[seen])
    collector = AllFeatures(Reference(torch.randn(50, 4)))
    collector.add(torch.arange(len(labels)), torch.tensor(labels), made)
    return collector.numbers(Accelerator(cpu=True), len(labels), wanted, classes)


def test_agreement_is_over_images_whose_prompt_has_a_class():
    labels, seen = [0, 1, 2, 3] * 10, [2, 0, 0, 1] * 10
    found = counted([2, 0, 1, -1], 3, labels, seen)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert (found["labels_asked"], found["labels_seen"]) == ([10, 10, 10], [20, 0, 10])
    for wanted, classes in (([-1, -1, -1, -1], 3), ([2, 0, 1, -1], 4), ([], 0)):
        assert counted(wanted or [0] * 4, classes, labels, seen)["agreement"] is None


@pytest.mark.slow
def test_a_report_on_captioned_digits_has_the_agreement_of_teacher_and_captions_and_none_without_labels(tmp_path):
    small = "--preset smoke --families unet --autoencoder-images 512 --training-images 512 --images 40 --steps 1"
    here(text_teacher.main, small, "--output-dir", tmp_path / "t")
    data = sets.load(str(tmp_path / "t" / "digits.npz"))
    lines = captions.prompts()
    assert data.caption_classes == {line: captions.class_of(i) for i, line in enumerate(lines)}
    few = "--images 40 --chunk 40 --steps 1 --samplers ddim --baseline-steps 0"
    model = ("--model", tmp_path / "t" / "unet")
    here(evaluate.main, few, *model, "--data", tmp_path / "t" / "digits.npz", "--output-dir", tmp_path / "run")
    (row,) = rows(tmp_path / "run").values()
    assert row["agreement"] == pytest.approx(agreeing(tmp_path / "run", data)) and sum(row["labels_asked"]) == 40
    assert "class agreement" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "fives.txt").write_text("a handwritten five\nsomething else\n")
    more = ("--captions", tmp_path / "fives.txt", "--output-dir", tmp_path / "fives")
    here(evaluate.main, few, *model, "--data", tmp_path / "t" / "digits.npz", *more)
    (row,) = rows(tmp_path / "fives").values()
    assert [i for i, n in enumerate(row["labels_asked"]) if n] == [5] and 10 < sum(row["labels_asked"]) < 30
    here(evaluate.main, few, *model, "--data digits --captions", tmp_path / "fives.txt", "--output-dir", tmp_path / "plain")
    (row,) = rows(tmp_path / "plain").values()
    assert row["agreement"] is None and "class agreement" not in (tmp_path / "plain" / "report.html").read_text()


def agreeing(folder, data):
    """The part of the kept images, of the only cell, in which the extractor sees the digit of the caption."""
    (path,) = (folder / "cells").glob("*ddim*.safetensors")
    seen = Extractor.create("digits")(files.load(path)[0]["images"]).logits.argmax(1)
    prompts = distinct(data.captions)
    drawn = initial_noise(range(len(seen)), (1,), len(prompts), 0).labels
    wanted = torch.tensor([captions.class_of(captions.prompts().index(prompts[i])) for i in drawn])
    return float((seen == wanted).float().mean())
