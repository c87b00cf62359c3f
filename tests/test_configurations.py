"""Configurations made in Python, and what a run says about its length."""

import dataclasses
import socket
import threading
import time

import numpy as np
import pytest
from test_bad_flags import FIELDS, RECIPES, flag_of

import teachers
from distill import npz
from distill.reading import numbers, regular
from distill.train import Optimization
from recipes import progressive, teacher
from recipes.common.accepted import Checked
from recipes.common.cli import LINE, REQUIRED, fail


def made(name, **values):
    needed = {f.name: "digits" for r, f in FIELDS if r == name and f.default is REQUIRED}
    return RECIPES[name].Config(**needed | values)


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_made_in_python_is_checked_as_flags_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert issubclass(RECIPES[name].Config, Checked)
    for field in dataclasses.fields(RECIPES[name].Config):
        low = field.metadata.get("at_least")
        if low is not None and low > 0:
            below = (low - 1,) if isinstance(field.default, tuple) else low - 1
            wrong = [below, "text", True] + [None] * (field.default is not None) + [1.5] * (field.type == "int")
            for value in wrong:
                with pytest.raises(ValueError, match=f"{flag_of(field)} .*: accepted are"):
                    made(name, **{field.name: value})
        if "choices" in field.metadata:
            with pytest.raises(ValueError, match=f"{flag_of(field)} none: accepted are"):
                made(name, **{field.name: ("none",) if isinstance(field.default, tuple) else "none"})
    with pytest.raises(ValueError, match="accepted is each value once"):
        progressive.Config(sweep_steps=(2, 2))


def test_the_defaults_and_presets_of_every_recipe_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, recipe in RECIPES.items():
        for preset in recipe.PRESETS.values():
            made(name, **preset)


def test_a_line_of_error_keeps_its_begin_and_end_and_is_never_long(capsys):
    with pytest.raises(SystemExit):
        fail(f"the begin {'x' * 5000} {'word ' * 5000} accepted is the end")
    line = capsys.readouterr().err
    assert (
        len(line) <= LINE + len("error: \n")
        and line.startswith("error: the begin xxx")
        and line.endswith("accepted is the end\n")
    )


@pytest.mark.slow
def test_a_run_says_how_many_images_its_whole_batches_have(tmp_path, capsys):
    assert [Optimization(images, 128).trained_images for images in (1, 100, 200, 256)] == [128, 128, 256, 256]
    small = [
        "--preset",
        "smoke",
        "--threads",
        "1",
        "--training-images",
        "20",
        "--batch-size",
        "32",
        "--output-dir",
        str(tmp_path / "t"),
    ]
    teacher.main(small)
    out = capsys.readouterr().out
    assert "32 training images in 1 steps" in out and "teacher: 32 images" in out


@pytest.mark.slow
def test_the_hub_is_asked_once_and_not_for_minutes_where_it_does_not_answer(monkeypatch):
    """A server that accepts connections and says nothing stands for a network that drops packets."""
    from huggingface_hub import constants

    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [calls.append(server.accept()) for _ in range(20)], daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(teachers.hub, "TIMEOUT", 0.3)
        began = time.monotonic()
        with pytest.raises(ValueError, match="cannot be fetched from the hub") as error:
            teachers.load("nobody/nothing")
        assert "\n" not in str(error.value) and time.monotonic() - began < 60
        assert len(calls) <= 2  # the client has one of its own before


def test_arrays_come_back_from_an_npz_file_mapped_or_unpacked(tmp_path):
    arrays = {
        "a": np.arange(24.0).reshape(2, 3, 4),
        "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c": np.zeros((0, 2), np.uint8),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = npz.read(tmp_path / "x.npz", ("a", "b", "c", "d"))
        assert found.keys() == arrays.keys() and all(np.array_equal(found[k], arrays[k]) for k in arrays)
        assert isinstance(found["a"], np.memmap) == (save is np.savez)


def test_a_regular_file_is_returned_and_a_large_one_refused_on_request(tmp_path):
    (tmp_path / "x").write_bytes(b"123")
    assert regular(tmp_path / "x") == tmp_path / "x" and list(numbers({"a": [1, {"b": 2.5}], "c": "d"})) == [1, 2.5]
    with pytest.raises(ValueError, match="3 bytes long, and at most 2 are accepted"):
        regular(tmp_path / "x", most=2)
