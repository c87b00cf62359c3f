"""The captions of a text-to-image model are data of its file, not text of its header, which safetensors limits to 100 MB."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import teachers
from distill import files
from teachers.custom import wrap


@pytest.fixture()
def captioned(teacher):
    """The embedded model as one of three prompts."""
    prompts = ["a seven", "ein “großes” 字", "tabs\tand \\ and \u2028 in one"]
    return replace(teacher, classes=3, null=3, embeddings={"labels": torch.arange(4)}, record={"of": "x", "prompts": prompts})


def test_captions_are_kept_in_a_file_beside_its_header(captioned, tmp_path):
    path = tmp_path / "m.safetensors"
    teachers.save(path, captioned)
    again = teachers.load_file(path)
    assert again.record == captioned.record and again.describe() == captioned.describe()
    assert again.fingerprint == captioned.fingerprint and captioned.record["prompts"][0] == "a seven"
    with safe_open(path, framework="pt") as file:
        assert "a seven" not in json.dumps(file.metadata())


def test_a_file_with_its_captions_in_the_header_is_still_read(captioned, tmp_path):
    path = tmp_path / "old.safetensors"
    files.save(path, captioned.tensors(), captioned.describe())
    assert teachers.load_file(path).record == captioned.record


@pytest.mark.slow
def test_the_captions_of_a_large_data_set_fit_into_a_students_file(tmp_path):
    prompts = [f"caption {i:06d} " + 200 * "a" for i in range(590_000)]
    net = torch.nn.Module()
    net.forward = lambda x, t, **cond: x
    model = wrap(net, shape=(2,), schedule="flow", prediction="x0")
    path = tmp_path / "m.safetensors"
    teachers.save(path, replace(model, record={"prompts": prompts}))
    assert teachers.load_file(path, net=net).record["prompts"] == prompts
