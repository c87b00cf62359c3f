"""What text-to-image and guided distillation refuse, in one line that names what is accepted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pipelines import sd

import teachers
from recipes import consistency, evaluate, guided
from recipes.common.checks import encoded
from teachers.encoder import with_prompts
from teachers.students import untrained


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("new") / "new.safetensors"
    teachers.save(path, untrained((1, 8, 8), None, (8, 16), 1, 0))
    return path


def test_a_teacher_without_a_null_class_is_sent_to_the_recipe_that_distils_it(unconditional, tmp_path, refused):
    line = refused(guided.main, "--preset smoke --teacher", unconditional, "--output-dir", tmp_path / "run")
    assert "has no null class" in line and "recipes/progressive.py distils this one" in line and "--guidance 1" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe, flags, message",
    [
        (guided, "--guidance-range 4 1", "range 4 to 1: accepted are two numbers, 0 or more, the second above the first"),
        (guided, "--guidance-range 2 2", "range 2 to 2: accepted are two numbers, 0 or more, the second above the first"),
        (guided, "--guidance-range 3", "accepted are two, the lowest and the highest scale"),
        (guided, "--guidance-range -1 2", "accepted are finite numbers, at least 0"),
        (consistency, "--lora-rank 2 --lora-targets nothing", "--lora-targets nothing: no layer has this name; there are"),
        (evaluate, "--captions no-such.txt", "--captions: no-such.txt: there is no such file"),
    ],
)
def test_ranges_targets_and_captions_that_cannot_be_are_one_line(recipe, flags, message, tmp_path, refused):
    model = "--model" if recipe is evaluate else "--teacher"
    few = "" if recipe is evaluate else "--preset smoke"
    assert message in refused(recipe.main, few, model, "digits", flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [None, {"dry_run": True}, {"conditions": "online"}])
def test_prompts_that_no_tokenizer_takes_whole_are_counted_where_no_cache_is_made(tmp_path, capsys, how):
    sd(tmp_path / "words").save_pretrained(tmp_path / "sd")
    prompts, config = ["a cat", 90 * "very " + "long", "blue"], None if how is None else SimpleNamespace(**how)
    capsys.readouterr()
    assert encoded(teachers.load(str(tmp_path / "sd")), prompts, config).count == 3
    said = capsys.readouterr()
    assert "warning: 1 of 3 prompts are longer than the tokenizer takes" in said.out + said.err


def test_long_lines_of_a_prompts_file_are_counted_once_for_all_processes(tmp_path, capsys, monkeypatch):
    sd(tmp_path / "words").save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text(f"a cat\n{90 * 'very '}long\n")
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        model = teachers.load(f"{tmp_path / 'sd'},prompts={tmp_path / 'prompts.txt'}")
        assert "".join(capsys.readouterr()).count("warning: 1 of 2 prompts are longer than the tokenizer takes") == count
        with_prompts(model, ["blue"])
        assert "warning" not in "".join(capsys.readouterr())
