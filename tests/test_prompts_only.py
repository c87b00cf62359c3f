"""A text-to-image teacher is distilled with a list of prompts and no image: from pure noise, measured against the teacher's own images."""

import json
from pathlib import Path

import pytest
from conftest import here, rows, words
from pipelines import sd

import teachers
from distill import files
from recipes import consistency, probe, progressive
from recipes.data import sets
from teachers.encoder import Encoder

PROMPTS = ["a cat", "two dogs on a boat", "blue", "a cat", 60 * "very " + "long"]
SHORT = "--preset smoke --batch-size 8 --images 40 --chunk 40 --sweep-steps 1 --force --features test_latent_runs:Pool"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Stable Diffusion pipeline and a file of prompts, of which two are equal and one is too long."""
    folder = tmp_path_factory.mktemp("made")
    sd(folder / "words").save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def arguments(made, out):
    return words("--teacher", made / "sd", "--data", f"prompts:{made / 'prompts.txt'}", "--output-dir", out)


@pytest.mark.slow
def test_prompts_are_encoded_once_beside_the_runs_and_the_teacher_is_the_reference(
    made, tmp_path, capsys, monkeypatch, stock_here
):
    few = words("--method cd --steps 1 --training-images 16", SHORT)
    here(consistency.main, *few, *arguments(made, tmp_path / "one"))
    said = capsys.readouterr()
    assert "warning: 1 of 4 prompts are longer than the tokenizer takes" in said.out + said.err
    assert "holds no images, so that nothing tests whether the teacher is a denoiser" in said.out
    (cache,), (known,) = tmp_path.glob("conditions-*"), tmp_path.glob("reference-*.safetensors")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["protocol"]["reference"] == "the teacher with 64 steps" and report["protocol"]["reference_images"] == 40
    made_at = (cache.stat().st_mtime_ns, known.stat().st_mtime_ns)
    one = files.load(tmp_path / "one" / "stages" / "cd" / "student.safetensors")[0]
    assert one["table.text"].shape[0] == 1
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
    config = consistency.parse(consistency.Config, "", consistency.PRESETS, [*few, *arguments(made, tmp_path / "two")])
    e = consistency.prepare(config, teachers.load(config.teacher), sets.load(config.data))
    e.run.close()
    assert (cache.stat().st_mtime_ns, known.stat().st_mtime_ns) == made_at and e.measurement.protocol.reference_images == 40


@pytest.mark.slow
def test_a_ladder_climbs_from_noise(made, tmp_path, stock_here):
    (tmp_path / "captions.txt").write_text("red\nblue\n")
    few = words("--start-steps 4 --end-steps 1 --images-per-stage 16 --guidance 2 --captions", tmp_path / "captions.txt", SHORT)
    here(progressive.main, *few, *arguments(made, tmp_path / "run"))
    found = rows(tmp_path / "run")
    assert {"student@2 ddim 2", "student@1 ddim 1"} <= found.keys()
    sha256 = Encoder(str(made / "sd")).table(["red", "blue"]).sha256
    assert {row["conditions_sha256"] for row in found.values()} == {sha256} and (tmp_path / "run" / "prompts.png").is_file()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["protocol"]["reference"] == "the teacher with 64 steps, guidance 2"
    assert teachers.load(str(tmp_path / "run")).classes == 0


def test_what_needs_images_is_refused_in_one_line(made, tmp_path, refused):
    data = arguments(made, tmp_path / "none")
    for recipe, more, message in (
        (consistency, "--method ect", "--method ect trains on images, and the data have none: accepted are cd, cmt, lmd"),
        (consistency, "--method scd", "--method scd trains on images"),
        (consistency, "--method cd --target-mix 0.5", "without images the target is the teacher alone"),
        (consistency, "--method cd --teacher digits", "prompts holds prompts alone, and the teacher takes 10 labels"),
        (progressive, "--teacher digits", "prompts holds prompts alone, and the teacher takes 10 labels"),
    ):
        assert message in refused(recipe.main, *data, more)
    assert "a probe needs images, and prompts holds prompts alone" in refused(probe.main, *data[2:4], "--model", made / "sd")
    missing = refused(consistency.main, *data, "--data", f"prompts:{tmp_path / 'no.txt'}")
    assert "no.txt" in missing
    assert not list(tmp_path.glob("none*"))


def test_the_prompts_of_a_file_have_the_shape_of_the_teachers_samples(made):
    found = sets.load(f"prompts:{made / 'prompts.txt'}")
    assert found.captions == PROMPTS and found.imageless
    shaped = found.shaped((4, 8, 8))
    assert shaped.shape == (4, 8, 8) and len(shaped.images) == 5 and shaped.images.untyped_storage().nbytes() == 4
