"""The arena: what a standing's interval covers, the front, and a run that goes on where it was killed."""

import fcntl
import json
import math
import os
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import here, words

from eval.arena import Standing, advice, front, quantile
from eval.pixels import Pixels
from recipes import arena, consistency, progressive
from recipes.common.locks import LOCK, unlock_all


def row(fid, half, seconds=10.0, **more):
    return {"fid": fid, "fid_interval": [fid - half, fid + half], "training_seconds": seconds, **more}


def test_the_interval_covers_training_seeds_and_samples():
    one = Standing.of("cd", 1, [row(1.0, 0.1)])
    assert (one.fid, one.half) == (1.0, pytest.approx(0.1))
    three = Standing.of("cd", 1, [row(f, 0.1, diversity=d) for f, d in ((1.0, 0.8), (1.2, 0.9), (1.4, 1.0))])
    assert three.fid == pytest.approx(1.2)
    assert three.half == pytest.approx(math.hypot(4.303 * stdev((1.0, 1.2, 1.4)) / math.sqrt(3), 0.1))
    assert dict(three.means) == {"diversity": pytest.approx(0.9)}
    assert quantile(1) == 12.706 and quantile(100) == quantile(9)


def test_the_front_holds_what_nothing_cheaper_beats_and_the_advice_names_it():
    named = {name: Standing.of(name, 1, [row(fid, 0.01, s)]) for name, fid, s in (("a", 2.0, 5), ("b", 1.0, 9), ("c", 1.5, 20))}
    assert [s.method for s in front(list(named.values()))] == ["a", "b"]
    said = advice(list(named.values()))
    assert said == "For 1 evaluation take from 5 s of training a (FID 2 ± 0.01), from 9 s of training b (FID 1 ± 0.01)."


def test_pixels_are_features_in_plus_and_minus_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, 3).reshape(2, 3, 1, 1)
    torch.testing.assert_close(Pixels()(images), torch.tensor([[-1, 1, -0.6]] * 2))


@pytest.mark.slow
def test_a_killed_arena_goes_on_and_trains_nothing_twice(new, tmp_path, monkeypatch):
    flags = "--methods progressive cd pdd sid --seeds 2 --training-images 128 --steps 1 2 --images 60 --chunk 60"
    flags += " --sweep-steps 1 --samplers ddim"
    arguments = (flags, "--teacher", new, "--output-dir", tmp_path / "arena", "--threads", "1")
    trained, learn = [], consistency.learn

    def counted(config, e, plan):
        trained.append((config.method, config.seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        learn(config, e, plan)

    monkeypatch.setattr(consistency, "learn", counted)
    for recipe in (consistency, progressive):
        monkeypatch.setattr(recipe, "PRESETS", recipe.PRESETS | {"default": {"force": True, "batch_size": 32}})
    with pytest.raises(SystemExit):
        here(arena.main, *arguments)
    here(arena.main, *arguments)
    assert trained == [("cd", 0), ("pdd", 0), ("sid", 0), ("cd", 1), ("cd", 1), ("pdd", 1), ("sid", 1)]
    out = json.loads((tmp_path / "arena" / "arena.json").read_text())
    assert {(s["method"], s["steps"]) for s in out["standings"]} == {
        ("progressive", 1), ("progressive", 2), ("cd", 1), ("cd", 2), ("pdd", 1), ("pdd", 2), ("sid", 1),
    }  # fmt: skip
    assert all(len(s["fids"]) == 2 and s["memory_gb"] > 0 for s in out["standings"])
    assert all(s["seconds"] > 0 for s in out["standings"] if s["method"] != "progressive")  # a stage of one step has no time
    assert all(0 < s["means"]["fid2"] != s["fid"] for s in out["standings"])
    page = (tmp_path / "arena" / "arena.html").read_text()
    assert "<svg" in page and out["advice"].split(" (")[0] in page


@pytest.mark.slow
def test_processes_share_the_trainings_and_the_first_waits_for_the_others(new, tmp_path, monkeypatch, refused, capsys):
    folder = tmp_path / "arena"
    flags = "--methods cmt --seeds 3 --training-images 64 --steps 1 --images 60 --chunk 60 --sweep-steps 1 --samplers ddim"
    arguments = (flags, "--teacher", new, "--output-dir", folder, "--threads", "1")
    trained, learn = [], consistency.learn
    monkeypatch.setattr(consistency, "PRESETS", consistency.PRESETS | {"default": {"force": True, "batch_size": 32}})
    assert "start the same command without --join first" in refused(arena.main, *arguments, "--join")
    assert not folder.exists()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(arena, "Measurement", SimpleNamespace(of=interrupted))  # what is measured is the claim of another test
    monkeypatch.setattr(consistency, "learn", interrupted)
    with pytest.raises(SystemExit):
        arena.main(words(*arguments))
    monkeypatch.setattr(consistency, "learn", lambda own, e, plan: (trained.append(own.seed), learn(own, e, plan)))
    unlock_all()  # of the process that was stopped
    theirs = folder / "trainings" / "cmt-1"
    theirs.mkdir()
    other = os.open(theirs / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    arena.main(words(*arguments, "--join"))
    assert trained == [0, 2]

    monkeypatch.setattr(arena.time, "sleep", lambda seconds: os.close(other))
    with pytest.raises(SystemExit):
        arena.main(words(*arguments))
    assert trained[2:] == [1]
    assert "waiting for 1 training of other processes" in capsys.readouterr().out


@pytest.mark.slow
def test_with_equal_seconds_a_method_trains_what_its_pilot_says(new, tmp_path, monkeypatch):
    flags = "--methods cmt pdd --seeds 1 --training-seconds 2 --steps 1 --images 60 --chunk 60 --sweep-steps 1 --samplers ddim"
    monkeypatch.setattr(arena, "PILOT", 320)
    monkeypatch.setattr(consistency, "PRESETS", consistency.PRESETS | {"default": {"force": True, "batch_size": 32}})
    monkeypatch.setattr(arena, "training_seconds", lambda path: {"cmt": 10.0, "pdd": 1.0}[path.parent.name])
    here(arena.main, flags, "--teacher", new, "--output-dir", tmp_path / "arena", "--threads 1")
    for name, images in (("cmt", 64), ("pdd", 640)):
        config = json.loads((tmp_path / "arena" / "trainings" / f"{name}-0" / "config.json").read_text())
        assert config["training_images"] == images
    facts = json.loads((tmp_path / "arena" / "arena.json").read_text())["facts"]
    assert facts["training images"] == "cmt 64, pdd 640" and facts["training seconds"].startswith("2, by pilots of 320")
