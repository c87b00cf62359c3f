import os
import pickle

import pytest
import torch
from conftest import refuses

from distill import files
from distill.resume import Resumable


def test_tensors_and_description_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    files.save(tmp_path / "x.safetensors", tensors, {"answer": [1, 2.5, None]})
    loaded, description = files.load(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors) and description["answer"] == [1, 2.5, None]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_named_in_one_line(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    files.save(path, {"a": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    refuses("not a whole safetensors file", files.load, path)


def test_pickles_are_refused_without_being_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name, write in (("a.pkl", lambda p: p.write_bytes(pickle.dumps(Bomb()))), ("b.pt", lambda p: torch.save({"x": 1}, p))):
        write(tmp_path / name)
        refuses("pickle", files.load, tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_foreign_safetensors_and_missing_files_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    refuses("without a fewstep description", files.load, tmp_path / "x.safetensors")
    refuses("no such file", files.load, tmp_path / "y.safetensors")


def test_weights_that_do_not_fit_are_named():
    net = torch.nn.Linear(2, 2)
    good = net.state_dict()
    refuses("1 weights missing: bias", files.load_weights, net, {"weight": good["weight"]}, "x")
    refuses("1 weights left over: more", files.load_weights, net, {**good, "more": torch.zeros(1)}, "x")
    refuses("1 weights of another shape: bias", files.load_weights, net, {**good, "bias": torch.zeros(3)}, "x")


def test_the_last_whole_checkpoint_is_taken_and_two_are_kept(tmp_path):
    resumable = Resumable(tmp_path)
    for step in (10, 20, 30):
        resumable.save(step, {"a": torch.full((50,), float(step))}, "me")
    assert len(list(tmp_path.iterdir())) == 2
    newest = tmp_path / "resume-000000030.safetensors"
    newest.write_bytes(newest.read_bytes()[:-20])
    step, tensors = resumable.latest("me")
    assert step == 20 and (tensors["a"] == 20).all()
    assert resumable.latest("somebody else") is None
    resumable.clear()
    assert resumable.latest("me") is None


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path):
    files.save(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {})
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"\x80", b"PK"])
def test_a_header_whose_length_looks_like_a_pickle_is_still_safetensors(tmp_path, first):
    """The file begins with the length of its header, little endian, which may be any bytes."""
    path = tmp_path / "x.safetensors"
    for size in range(0, 20_000, 8):
        files.save(path, {"w": torch.zeros(1)}, {"note": "x" * size})
        if path.read_bytes().startswith(first):
            break
    assert path.read_bytes().startswith(first)
    assert files.load(path)[1]["note"] == "x" * size
