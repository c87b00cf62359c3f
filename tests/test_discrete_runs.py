"""Runs of the discrete views: bits through recipes/teacher.py, categories through recipes/masked.py."""

import json

import pytest
import torch

import teachers
from distill import files
from distill.bits import pixels_to_tokens
from distill.masked import MaskedRegression
from distill.rng import Rng
from distill.sdtt import SelfDistillation
from distill.train import Optimization, train
from eval.generate import initial_noise
from eval.tokens import token_images, uniform_of
from recipes import masked as recipe
from recipes import teacher as teacher_recipe
from recipes.common.checks import check_match
from recipes.data import sets
from teachers import masked
from teachers.codec import Codec

SHAPE = (1, 8, 8)
TINY = ["--channels", "8", "16", "--training-images", "128", "--batch-size", "16", "--images", "40", "--sweep-steps", "2"]
CPU = torch.device("cpu")


def tiny(classes=10, **changes):
    return masked.new(SHAPE, 4, classes, (8, 16), 1, **{"seed": 0} | changes)


def test_data_in_bits_are_images_of_four_levels_whose_samples_are_their_bits():
    plain, data = sets.load("digits"), sets.load("digits,bits=2")
    assert data.images.unique().tolist() == [0, 85, 170, 255] and data.images.shape == plain.images.shape
    assert (data.images.double() - plain.images.double()).abs().max() <= 42.5 and data.name == "digits, 2 bits"
    x0 = data.x0(slice(50))
    assert tuple(x0.shape[1:]) == data.sample_shape == (2, 8, 8) and x0.unique().tolist() == [-1, 1]
    assert torch.equal(pixels_to_tokens(x0, 2) * 85, data.images[:50].long()) and plain.sample_shape == (1, 8, 8)
    codec = Codec.of_bits(2)
    assert torch.equal(codec.decode(0.3 * x0), plain.scaled(data.images[:50], CPU))
    assert torch.equal(codec.encode(plain.scaled(data.images[:50], CPU)), x0)


def test_a_model_of_bits_and_data_that_are_not_its_bits_are_refused():
    model = teachers.load("digits")
    with pytest.raises(ValueError, match="trained on 2 bits"):
        check_match(model, sets.load("digits,bits=2"))
    for text in ("bits=0", "bits=9", "bits=two"):
        with pytest.raises(ValueError, match="from 1 to 8"):
            sets.load(f"digits,{text}")
    with pytest.raises(ValueError, match="accepted are 1 to 8"):
        Codec.from_description({"scale": 1.0, "shift": 0.0, "bits": 9}, files.Path())


@pytest.mark.slow
def test_a_teacher_of_bits_makes_images_of_four_levels_again_when_it_is_loaded(tmp_path):
    out = tmp_path / "run"
    arguments = ["--data", "digits,bits=2", "--training-images", "128", "--channels", "8", "16", "--output-dir", str(out)]
    teacher_recipe.main(arguments)
    model = teachers.load(str(out / "teacher.safetensors"))
    assert model.shape == (2, 8, 8) and model.image_shape == SHAPE and model.codec == Codec.of_bits(2)
    levels = ((model.decode(torch.randn(100, 2, 8, 8)) + 1) * 127.5).unique()
    assert torch.allclose(levels, torch.tensor([0.0, 85.0, 170.0, 255.0]), atol=1e-3)
    assert (out / "samples.png").is_file()
    check_match(model, sets.load("digits,bits=2"), training=True)
    with pytest.raises(ValueError, match="trained on 3 bits"):
        check_match(model, sets.load("digits,bits=3"))


def test_a_masked_model_comes_back_from_its_file_and_its_file_is_refused_elsewhere(tmp_path):
    model = tiny()
    model.denoiser.net.eval()
    masked.save(tmp_path / "m.safetensors", model)
    again = masked.load(tmp_path / "m.safetensors")
    tokens, t = torch.randint(5, (3, *SHAPE)), torch.tensor(0.5)
    cond = model.condition(torch.tensor([1, 2, 3]))
    assert torch.equal(again.denoiser(tokens, t, **cond), model.denoiser(tokens, t, **cond))
    assert (again.shape, again.classes, again.steps) == (SHAPE, 10, None)
    with pytest.raises(ValueError, match="masked diffusion model of tokens") as error:
        teachers.load(str(tmp_path / "m.safetensors"))
    assert "\n" not in str(error.value)
    teachers.save(tmp_path / "c.safetensors", teachers.load("digits"))
    with pytest.raises(ValueError, match="a continuous diffusion model; accepted are the masked"):
        masked.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "changes", [{"values": 3}, {"values": "4"}, {"shape": [8, 8]}, {"classes": 10**9}, {"steps": 0}, {"shape": [2, 8, 8]}]
)
def test_a_description_that_does_not_fit_the_weights_is_refused_in_one_line(changes, tmp_path):
    masked.save(tmp_path / "m.safetensors", tiny())
    tensors, description = files.load(tmp_path / "m.safetensors")
    files.save(tmp_path / "m.safetensors", tensors, description | {"masked": description["masked"] | changes})
    with pytest.raises(ValueError) as error:
        masked.load(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value) and "m.safetensors" in str(error.value)


def test_an_image_depends_on_its_index_and_not_on_its_batch():
    model = tiny()
    (whole,) = token_images(model, 3, "ancestral", [range(6)], 5, CPU)
    parts = torch.cat(list(token_images(model, 3, "ancestral", [range(0, 2), range(2, 6)], 5, CPU)))
    assert torch.equal(whole, parts) and whole.unique().tolist() == [0, 85, 170, 255]
    (other,) = token_images(model, 3, "ancestral", [range(6)], 6, CPU)
    assert not torch.equal(whole, other)


def test_the_numbers_of_sampling_are_uniform():
    u = uniform_of(initial_noise(range(2000), (1,), None, 0), torch.empty(2000, 5, 2)).flatten().sort().values
    assert float((u - (torch.arange(20_000) + 0.5) / 20_000).abs().max()) < 0.015 and u[0] > 0 and u[-1] < 1


def test_a_bad_step_of_a_masked_model_rolls_back():
    """`distill.replay` looks for the noise level of a step, which categories do not have."""
    from accelerate import Accelerator

    class Once:
        bad = 1

        def __call__(self, student, x0, *, rng, progress, **cond):
            loss = MaskedRegression()(student, x0, rng=rng, progress=progress, **cond)
            Once.bad, now = 0, Once.bad
            return loss * torch.nan if now else loss

    batches = lambda step: iter(lambda: (torch.zeros(8, *SHAPE, dtype=torch.long), {}), None)  # noqa: E731
    states = list(train(Once(), tiny(None).student(), batches, Accelerator(cpu=True), Optimization(24, 8), seed=0, phase="p"))  # type: ignore[arg-type]
    assert [s.step for s in states] == [1, 2, 3] and states[0].rollback


def test_rows_of_a_batch_lose_the_same_on_every_number_of_processes():
    model, teacher = tiny(None).denoiser, tiny(None, seed=1).denoiser
    x0 = torch.randint(4, (300, *SHAPE), generator=torch.Generator().manual_seed(0))
    for method in (MaskedRegression(), SelfDistillation(teacher, 4)):
        with torch.no_grad():
            whole = method(model, x0, rng=Rng.seeded(3, CPU, 300), progress=0)
            part = method(model, x0[150:], rng=Rng.seeded(3, CPU, 300, slice(150, 300)), progress=0)
        assert torch.allclose(whole[150:], part, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_masked_run_that_was_stopped_continues_to_the_same_bits_and_is_distilled(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(recipe, "bits_per_token", lambda *known: 0.0)
    recipe.main([*TINY, "--output-dir", str(whole)])
    calls = iter(range(100))
    monkeypatch.setattr(recipe, "stop_requested", lambda: next(calls) == 4)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        recipe.main([*TINY, "--output-dir", str(cut)])
    assert list((cut / "resume").rglob("*.safetensors")) and not (cut / "teacher.safetensors").exists()
    recipe.main([*TINY, "--output-dir", str(cut)])
    one, two = (files.load(folder / "teacher.safetensors")[0] for folder in (whole, cut))
    assert all(torch.equal(one[k], two[k]) for k in one) and not list((cut / "resume").rglob("*.safetensors"))
    (row,) = json.loads((whole / "fid.json").read_text())
    assert row["fid"] > 0 and row["steps"] == 2 and (whole / "samples.png").is_file()

    distil = ["--teacher", str(whole / "teacher.safetensors"), "--start-steps", "4", "--output-dir", str(tmp_path / "students")]
    recipe.main([*TINY, *distil, "--steps", "2", "1"])
    assert masked.load(tmp_path / "students" / "stages" / "1" / "student.safetensors").steps == 1
    assert [r["label"] for r in json.loads((tmp_path / "students" / "fid.json").read_text())] == [
        "teacher",
        "student@2",
        "student@1",
    ]
    for flags, message in (
        (["--steps", "3"], "must divide 4"),
        (["--data", "digits"], "option bits"),
        (["--data", "digits,bits=3", "--steps", "2"], "must agree"),
    ):
        with pytest.raises(SystemExit) as end:
            recipe.main([*distil[:-1], str(tmp_path / "refused"), *flags])
        assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "refused").exists()
