"""Readers of files load what they get or refuse it in one line, whatever it holds. `tests/fuzz_readers.py` looks for longer."""

import random

import pytest
from fuzz_readers import Readers

KINDS = ("model", "reference", "statistics", "images", "latents")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return Readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_loaded_or_refused_in_one_line(readers, kind):
    pick = random.Random(1).randrange
    loaded = sum(readers.read(kind, pick) for _ in range(60))
    assert loaded < 60 and set(readers.names) == set(KINDS)
