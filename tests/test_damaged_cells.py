"""Finished cells that were torn or altered on the disk are named and measured again; whole ones, and old ones, are used."""

import json
import os

import pytest
import torch
from test_report_truth import TINY

from distill import files
from distill.sampling import Sampling
from eval import timing
from eval.cells import Cell, finished, head, picture_path, read_sealed, row_path, save, write_sealed


@pytest.fixture
def cell(tmp_path, teacher):
    """A finished cell: the cell, its folder, its row, and its two files."""
    made = Cell("teacher", "teacher", teacher, Sampling(), 2)
    row = head(made, TINY) | {"fid": 0.1 + 0.2, "fid_left_out": [1 / 3, 1e-300], "kid": None}
    save(tmp_path, row, torch.arange(1024, dtype=torch.uint8).view(16, 1, 8, 8))
    return made, tmp_path, row, row_path(tmp_path, made.name), picture_path(tmp_path, made.name)


def test_a_whole_cell_is_used_with_its_row_to_the_bit_and_without_a_word(cell, capsys):
    made, folder, row, *_ = cell
    assert finished(folder, made, TINY) == row and capsys.readouterr().err == ""


@pytest.mark.parametrize("which", [3, 4], ids=["row", "pictures"])
@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "gone", "zeroed"])
def test_a_damaged_file_of_a_cell_is_named_in_one_line_and_the_cell_is_measured_again(cell, capsys, which, damage):
    made, folder, _, *_ = cell
    path = cell[which]
    data = path.read_bytes()
    at = data.index(b"0.3000") + 4 if which == 3 else len(data) - 100  # a digit of the FID, a pixel
    changed = {
        "torn": data[: len(data) // 2], "empty": b"", "flipped": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "zeroed": bytes(len(data)),
    }  # fmt: skip
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    assert finished(folder, made, TINY) is None
    said = capsys.readouterr().err.strip()
    if (damage, which) != ("gone", 3):  # a cell without a row was never finished
        assert said.startswith(str(path)) and said.endswith("the cell is measured again") and "\n" not in said


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"sha256": 5}', '{"sha256": {}}', "[" * 100_000, "\udcff"])
def test_json_that_is_no_row_is_a_damaged_cell(cell, capsys, text):
    made, folder, _, path, _ = cell
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert finished(folder, made, TINY) is None and capsys.readouterr().err.startswith(str(path))


def test_a_pipe_in_place_of_a_cell_is_damaged_and_not_waited_for(cell):
    made, folder, _, path, _ = cell
    path.unlink()
    os.mkfifo(path)
    assert finished(folder, made, TINY) is None


def test_a_cell_of_an_older_version_has_no_hash_and_is_used(cell):
    made, folder, row, path, _ = cell
    files.write_json(path, row)
    assert finished(folder, made, TINY) == row


def test_the_cell_of_another_model_or_protocol_is_not_used_and_not_damaged(cell, capsys, teacher):
    made, folder, *_ = cell
    other = Cell("teacher", "teacher", teacher, Sampling(grid="trailing"), 2)
    assert other.name == made.name and finished(folder, other, TINY) is None and capsys.readouterr().err == ""


def test_damaged_timings_are_measured_again(tmp_path):
    path = tmp_path / timing.FILE
    write_sealed(path, {"of": "x", "seconds": {"a": [1.0]}})
    assert timing._read(path, "x")["seconds"] == {"a": [1.0]} and timing._read(path, "y") is None
    path.write_text(path.read_text().replace("1.0", "1.1"))
    assert timing._read(path, "x") is None


def test_the_order_of_keys_is_no_part_of_the_hash(tmp_path):
    write_sealed(tmp_path / "x.json", {"b": 1, "a": [2.5]})
    data = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(dict(reversed(data.items()))))
    assert read_sealed(tmp_path / "x.json")[0] == {"a": [2.5], "b": 1}
