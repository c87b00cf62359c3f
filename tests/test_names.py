"""The names that --help shows without torch are those of the tables, in their order."""

import dataclasses

import pytest

from distill import consistency, denoiser, distance, grid, masked, names, regression, regularize, samplers
from distill.sampling import Sampling
from eval import collect
from eval import names as eval_names
from recipes import evaluate, export, latents
from recipes.common.accepted import choices_of
from recipes.common.cost import ADAM
from recipes.data.latent_shards import DTYPES
from teachers.codec import DECODING
from teachers.export.deliver import VARIANTS

TABLES = {
    "SAMPLERS": samplers.SAMPLERS,
    "BASELINES": samplers.BASELINES,
    "GRIDS": grid.GRIDS,
    "PREDICTIONS": denoiser.PREDICTIONS,
    "DRAWS": regression.DRAWS,
    "DISTANCES": distance.DISTANCES,
    "WEIGHTS": distance.WEIGHTS,
    "GAP_WEIGHTS": consistency.GAP_WEIGHTS,
    "RESIDUALS": regularize.RESIDUALS,
    "OPTIMIZERS": ADAM,
    "MASKED_SAMPLERS": masked.SAMPLERS,
}


def choices(config, name):
    return choices_of(next(field for field in dataclasses.fields(config) if field.name == name))


def test_every_list_of_names_is_compared_here():
    assert TABLES.keys() == {name for name, value in vars(names).items() if isinstance(value, tuple)}


@pytest.mark.parametrize("name", TABLES)
def test_the_names_on_the_command_line_are_those_of_the_table(name):
    assert getattr(names, name) == tuple(TABLES[name])


def test_the_choices_of_metrics_and_of_number_formats_are_those_of_their_tables():
    assert tuple(collect.COLLECTORS) == eval_names.METRICS
    assert choices(export.Config, "variants") == list(VARIANTS)
    assert choices(latents.Config, "dtype") == list(DTYPES)
    assert choices(evaluate.Config, "decode") == list(DECODING)


def test_the_text_about_samplers_names_what_sampling_accepts():
    words = names.SAMPLER_TEXT.partition(" and ")[0].split(", ")
    assert [Sampling(word).name for word in words] == list(samplers.SAMPLERS)
    assert Sampling.parse("consistency:0.5").gamma == 0.5 and "consistency:GAMMA" in names.SAMPLER_TEXT
