"""Damaged files are noticed by their sha256 and named, and never used without a word."""

import errno
import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill import files
from distill.resume import Resumable
from recipes import progressive
from recipes.common.run import finished_file

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([True]),
    "d": torch.zeros(0),
}


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_no_flipped_bit_changes_what_a_file_gives_unnoticed(tmp_path):
    path = tmp_path / "x.safetensors"
    files.save(path, TENSORS, {"answer": [1, 2.5, None, "text"]})
    whole, draw = path.read_bytes(), random.Random(0)
    first, description = files.load(path)
    for byte in range(0, len(whole), 3):
        flip(path, byte, draw.randrange(8))
        try:
            tensors, found = files.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # white space of the header, and the name of the sha256 itself
            assert description.items() <= found.items() and tensors.keys() == first.keys()
            assert all(torch.equal(tensors[k], first[k]) and tensors[k].dtype == first[k].dtype for k in first)
        path.write_bytes(whole)


def test_a_flipped_weight_is_named_as_damage(tmp_path):
    path = tmp_path / "x.safetensors"
    files.save(path, TENSORS, {})
    flip(path, -1)
    with pytest.raises(ValueError, match="damaged, its contents do not match the sha256"):
        files.load(path)


def test_a_file_of_an_older_version_has_no_sha256_and_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"fewstep": json.dumps({"format": "fewstep/1", "answer": 1})})
    tensors, description = files.load(path)
    assert torch.equal(tensors["a"], torch.ones(2)) and description == {"format": "fewstep/1", "answer": 1}


@pytest.mark.parametrize("text", ["null", "[1]", "{", "[" * 10_000])
def test_a_description_that_is_no_object_is_one_line(tmp_path, text):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"fewstep": text})
    with pytest.raises(ValueError, match="the description: "):
        files.load(tmp_path / "x.safetensors")


def test_a_file_holds_its_tensors_unchanged_and_a_second_copy_is_equal(tmp_path):
    for name in ("x", "y"):
        files.save(tmp_path / f"{name}.safetensors", TENSORS, {"answer": 1})
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in TENSORS.items())
    tensors, description = files.load(tmp_path / "x.safetensors")
    files.save(tmp_path / "z.safetensors", tensors, description)  # a description that was loaded can be written again
    assert (tmp_path / "z.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    lines: list[str] = []
    resumable = Resumable(tmp_path, lines.append)
    for step in (10, 20):
        resumable.save(step, {"a": torch.full((50,), float(step))}, "me")
    flip(tmp_path / "resume-000000020.safetensors", -1, 6)
    step, tensors = resumable.latest("me")
    assert step == 10 and (tensors["a"] == 10).all()
    assert (
        len(lines) == 1
        and "resume-000000020.safetensors: damaged" in lines[0]
        and "the checkpoint before it is used" in lines[0]
    )


def test_a_finished_file_that_is_damaged_is_to_be_deleted():
    with pytest.raises(ValueError, match="x: damaged: delete it, so that it is made again"), finished_file():
        raise ValueError("x: damaged")


TINY = "--preset smoke --threads 1 --batch-size 8 --start-steps 4 --images-per-stage 64 --images 60 --chunk 60 --sweep-steps 1"


def run(folder, capsys=None):
    """Return exit code and error lines of the recipe."""
    code = 0
    try:
        progressive.main([*TINY.split(), "--output-dir", str(folder)])
    except SystemExit as error:
        code = error.code
    return code, [] if capsys is None else [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_disks_that_fill_or_become_read_only_and_damaged_stages_are_one_line_each_and_the_run_still_ends_with_the_same_bits(
    tmp_path, capsys, monkeypatch
):
    """One run, which is stopped by its disk after every few files, in all its phases, and whose first stage is then damaged."""
    monkeypatch.setattr("teachers.export.deliver.verify", lambda *arguments: 0.0)
    assert run(tmp_path / "whole")[0] == 0
    whole, folder, fsync = (tmp_path / "whole/student.safetensors").read_bytes(), tmp_path / "full", os.fsync
    written: list[str] = []  # by this attempt
    stops: list[str] = []  # the file that could not be written, of each attempt

    problems = (errno.ENOSPC, errno.EROFS, errno.EACCES)

    def failing_after_some(descriptor):
        written.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        if len(written) == 6 + 4 * len(stops):
            raise OSError(problem := problems[len(stops) % 3], os.strerror(problem))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_after_some)
    capsys.readouterr()
    code = 2
    while code:
        written.clear()
        code, errors = run(folder, capsys)
        assert len(errors) == (code != 0) and len(stops) < 9
        if code:
            assert (
                code == 2 and os.strerror(problems[len(stops) % 3]) in errors[0] and "run the same command again" in errors[0]
            )
            stops.append(written[-1])
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(stops) >= 3, stops
    assert (folder / "student.safetensors").read_bytes() == whole and not list(folder.rglob("*.part"))
    lines = [
        [(e["phase"], e["step"]) for e in map(json.loads, (f / "metrics.jsonl").open())] for f in (folder, tmp_path / "whole")
    ]
    assert lines[0] == lines[1]

    stage = folder / "stages" / "2" / "student.safetensors"
    flip(stage, -1)
    code, errors = run(folder, capsys)
    assert code == 2 and len(errors) == 1
    assert f"{stage}: damaged" in errors[0] and "delete it, so that it is made again" in errors[0]
    assert (folder / "student.safetensors").read_bytes() == whole
    stage.unlink()
    (folder / "stages" / "1" / "student.safetensors").unlink()
    assert run(folder)[0] == 0
    assert (folder / "student.safetensors").read_bytes() == whole
