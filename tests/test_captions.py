"""The prompts of a text-to-image model belong to the data: its file holds the empty prompt, and older files with prompts are read."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import teachers
from distill import files
from teachers.conditions import Conditions, Rows
from teachers.saved import PROMPTS

TEXTS = ["a seven", "ein “großes” 字", "tabs\tand \\ and \u2028 in one"]


@pytest.fixture()
def captioned(teacher):
    """The embedded model as one of three prompts."""
    table = Conditions.of({"labels": torch.arange(4)}, TEXTS, "e" * 64)
    return replace(teacher, classes=3, null=3, embeddings=table, record={"of": "x"})


def test_a_file_holds_the_empty_prompt_and_no_other(captioned, tmp_path):
    path = tmp_path / "m.safetensors"
    teachers.save(path, captioned)
    again = teachers.load_file(path)
    assert again.describe() == captioned.describe() and again.fingerprint == captioned.fingerprint
    assert (again.classes, again.null, again.embeddings.encoder) == (0, 0, "e" * 64) and again.embeddings.prompts == ()
    assert load_file(path)["table.labels"].tolist() == [3] and again.condition(torch.tensor([0]))["labels"].tolist() == [3]
    assert PROMPTS not in load_file(path)
    with safe_open(path, framework="pt") as file:
        assert not any(text in json.dumps(file.metadata(), ensure_ascii=False) for text in TEXTS)
    with pytest.raises(ValueError, match="has no prompts: accepted is"):
        again.condition(torch.tensor([1]))
    bound = again.with_conditions(captioned.embeddings)
    assert (bound.classes, bound.null) == (3, 3) and bound.condition(torch.tensor([2, 3]))["labels"].tolist() == [2, 3]
    assert bound.fingerprint == again.fingerprint and bound.conditions_sha256 != again.conditions_sha256


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_an_older_file_with_its_prompts_is_still_used_with_them(captioned, tmp_path, where):
    path, description = tmp_path / "old.safetensors", captioned.describe() | {"classes": 3, "null": 3}
    description.pop("encoder_sha256")
    tensors = captioned.tensors() | {"table.labels": torch.arange(4)}
    if where == "header":
        description["record"] = {"of": "x", "prompts": TEXTS}
    else:
        tensors[PROMPTS] = torch.frombuffer(bytearray(json.dumps(TEXTS).encode()), dtype=torch.uint8)
    files.save(path, tensors, description)
    again = teachers.load_file(path)
    assert again.embeddings.prompts == TEXTS and again.record == {"of": "x"} and again.embeddings.encoder == ""
    labels = torch.tensor([2, 0, 3])
    assert again.condition(labels)["labels"].tolist() == [2, 0, 3] and (again.classes, again.null) == (3, 3)
    teachers.save(tmp_path / "new.safetensors", again)
    assert PROMPTS not in load_file(tmp_path / "new.safetensors")


def test_a_table_of_another_encoder_is_refused_by_its_sha256_or_else_by_its_empty_prompt(captioned):
    rows = {"labels": torch.tensor([5.0, 1.0])}
    other = Conditions.of(rows, ["a"], "f" * 64)
    with pytest.raises(ValueError, match="made by another text encoder or tokenizer"):
        captioned.with_conditions(other)
    unknown = replace(captioned, embeddings=Conditions.of(rows))
    assert unknown.with_conditions(Conditions.of({"labels": torch.tensor([1.001])}, (), "f" * 64)).classes == 0
    with pytest.raises(ValueError, match="another text encoder"):
        unknown.with_conditions(Conditions.of({"labels": torch.tensor([1.1])}, (), "f" * 64))
    with pytest.raises(ValueError, match="not text"):
        teachers.load("digits").with_conditions(other)


def test_rows_of_several_parts_are_indexed_like_one_tensor():
    whole = torch.arange(60.0).view(10, 3, 2)
    rows = Rows([whole[:4], whole[4:5], whole[5:]])
    index = torch.tensor([9, 0, 4, 4, 3, 5])
    assert torch.equal(rows[index], whole[index]) and torch.equal(rows[2:7], whole[2:7]) and torch.equal(rows[9:], whole[9:])
    assert rows.shape == whole.shape and len(rows) == 10 and rows.nbytes == whole.nbytes and rows[:0].shape == (0, 3, 2)
    assert torch.equal(rows.contiguous(), whole) and torch.equal(rows.index_select(0, index), whole[index])
    with pytest.raises(IndexError):
        rows[torch.tensor([10])]
