"""Every flag of every recipe against values that it does not accept: one line, exit code 2, nothing loaded and nothing written.

The tables are made from the fields of the configurations, so that a new recipe or flag is in them at once.
"""

import dataclasses
import importlib
import os
import typing

import pytest

import teachers
from fewstep.__main__ import commands
from recipes.common.accepted import flag_of, number_kind
from recipes.common.cli import REQUIRED
from recipes.data import sets

RECIPES = {name: importlib.import_module(f"recipes.{name}") for name in commands()}
FIELDS = [(name, field) for name, recipe in RECIPES.items() for field in dataclasses.fields(recipe.Config)]
HINTS = {name: typing.get_type_hints(recipe.Config) for name, recipe in RECIPES.items()}
LONGEST = 300  # characters of a line of error


def required(name, *but):
    """The flags that a recipe cannot do without."""
    fields = [field for recipe, field in FIELDS if recipe == name and field.default is REQUIRED and field.name not in but]
    return [word for field in fields for word in (flag_of(field), "digits")]


def refused(capsys, name, *arguments):
    """Run a recipe in this process and return its one line of error."""
    before = sorted(os.listdir("."))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        RECIPES[name].main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert len(err) <= LONGEST, err
    assert sorted(os.listdir(".")) == before
    return err


@pytest.fixture
def unloaded(tmp_path, monkeypatch):
    """An empty working directory, and loaders that fail the test."""
    monkeypatch.chdir(tmp_path)
    for loader in (teachers, sets):
        monkeypatch.setattr(loader, "load", lambda spec: pytest.fail("loaded"))


def numbers_out_of(name, field):
    """Texts that a field of numbers does not accept."""
    bounds = field.metadata
    low, high = bounds.get("at_least", bounds.get("above")), bounds.get("at_most", bounds.get("below"))
    whole = number_kind(HINTS[name][field.name]) is int
    below = low - 1 if "at_least" in bounds else low
    return dict.fromkeys(
        [f"{below}", f"{-(10**15)}", f"{high + 1}", f"{10**15}", "9" * 5000, "nan", "inf", "-inf", "many", ""]
        + (["1.5"] if whole else ["0x10"])
    )


NUMBERS = [
    pytest.param(name, field, text, id=f"{name}-{field.name}={text[:20]}")
    for name, field in FIELDS
    if number_kind(HINTS[name][field.name])
    for text in numbers_out_of(name, field)
]


@pytest.mark.parametrize("name, field, text", NUMBERS)
def test_a_number_out_of_bounds_is_refused_before_anything_is_loaded(name, field, text, capsys, unloaded):
    values = [*map(str, field.default[:1]), text] if isinstance(field.default, tuple) else [text]
    line = refused(capsys, name, *required(name), flag_of(field), *values)
    assert flag_of(field) in line and ("accepted are" in line or "choose from" in line)


def test_every_number_of_every_recipe_is_bounded_on_both_sides_and_its_help_says_so(capsys):
    for name, field in FIELDS:
        if number_kind(HINTS[name][field.name]):
            assert {"at_least", "above"} & field.metadata.keys(), f"{name}: {flag_of(field)} has no lower bound"
            assert {"at_most", "below"} & field.metadata.keys(), f"{name}: {flag_of(field)} has no upper bound"
    with pytest.raises(SystemExit):
        RECIPES["progressive"].main(["--help", "all"])
    assert "(at least 1, at most 65,536; default: 128)" in " ".join(capsys.readouterr().out.split())
