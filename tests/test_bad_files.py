"""Every path and every spec of every recipe against files that it does not accept: one line, exit code 2, nothing written."""

import os
import resource
import signal

import bad_files
import pytest
from test_bad_flags import FIELDS, HINTS, refused, required

from recipes.common.accepted import PATHS, flag_of, number_kind
from recipes.data import sets

SPECS = {"model": "models", "teacher": "models", "student": "models", "data": "data", "source": "data", "runs": "runs"}
FREE = {
    "features",
    "sizes",  # tests/test_several_sizes.py
    "second_features",
    "benchmark",  # tests/test_layouts.py
    "sampler",
    "samplers",
    "student_samplers",
    "target_mix",
    "lora_targets",
    "regularize",
    "jumps",
    "license",
    "push_to_hub",
}  # texts that name no file
FEW = (
    "absent",
    "pipe",
    "truncated",
    "sparse",
    "without schedule",
    "pipeline deep",
    "images of pipes",
    "json list",
    "short tar",
)
MEGABYTES = 600  # that a refusal may need
PATHS_OF = {
    kind: [pytest.param(name, field, id=f"{name}-{field.name}") for name, field in FIELDS if field.metadata.get("path") == kind]
    for kind in PATHS
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Return the bad files of a kind, by name."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = getattr(bad_files, kind)(tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


@pytest.fixture(autouse=True)
def patience(tmp_path, monkeypatch):
    """An empty working directory, and an end to what hangs."""
    monkeypatch.chdir(tmp_path)
    signal.alarm(300)
    yield
    signal.alarm(0)


def each_refused(capsys, name, flag, values, *arguments):
    """Run a recipe once for every value of a flag, and name those that it does not refuse as it should."""
    failed, peak = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, value in values.items():
        try:
            refused(capsys, name, *required(name, flag[2:].replace("-", "_")), *arguments, flag, value)
        except (Exception, pytest.fail.Exception) as error:
            failed[what] = f"{type(error).__name__}: {error}"
    assert not failed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024


def test_every_text_that_can_name_a_file_is_in_these_tables():
    for name, field in FIELDS:
        known = {"choices", "path"} & field.metadata.keys() or field.name in {*SPECS, *FREE}
        assert known or number_kind(HINTS[name][field.name]) or field.type == "bool", f"{name}: {flag_of(field)}"


def test_files_that_are_no_models_are_refused(bad, capsys):
    each_refused(capsys, "sample", "--model", bad("models"), "--steps", 1)


@pytest.mark.parametrize("kind", ["npz", "data", pytest.param("bombs", marks=pytest.mark.slow)])
def test_files_that_are_no_data_are_refused(bad, kind, capsys):
    each_refused(capsys, "teacher", "--data", bad(kind))


@pytest.mark.parametrize("name, field", [(n, f) for n, f in FIELDS if f.name in SPECS], ids=lambda v: getattr(v, "name", v))
def test_every_recipe_refuses_them(bad, name, field, capsys):
    found = bad(SPECS[field.name])
    few = {what: found[what] for what in FEW if what in found} if field.name != "runs" else found
    each_refused(capsys, name, flag_of(field), few)


@pytest.mark.parametrize("name, field", PATHS_OF["file"])
def test_input_files_are_refused_before_anything_is_loaded(bad, name, field, capsys, monkeypatch):
    monkeypatch.setattr("teachers.load", lambda spec: pytest.fail("loaded"))
    whole = {"text", "zeros", "pickle"}  # their content is looked at later
    each_refused(
        capsys, name, flag_of(field), {what: path for what, path in bad("npz").items() if what in bad_files.NAMES - whole}
    )


@pytest.mark.parametrize("name, field", PATHS_OF["folder"] + PATHS_OF["new"])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_loaded(name, field, bad, capsys, monkeypatch):
    monkeypatch.setattr("teachers.load", lambda spec: pytest.fail("loaded"))
    monkeypatch.setattr("recipes.data.sets.load", lambda spec: pytest.fail("loaded"))
    models = bad("models")
    taken = {what: models[what] for what in ("text", "pipe", "below", "long", "null device", "loop")}
    taken |= {"/proc": "/proc/run", "a device": "/dev/null/run", "deep": "/proc/a/b/c", "many": "d/" * 3000 + "x"}
    if name == "sample":
        taken |= {"a picture": "/proc/samples.png", "folder": models["folder"]}
    each_refused(capsys, name, flag_of(field), taken)


@pytest.mark.parametrize("name, field", PATHS_OF["folder"])
def test_folders_with_a_configuration_that_is_none_are_refused(name, field, bad, capsys, monkeypatch):
    monkeypatch.setattr("teachers.load", lambda spec: pytest.fail("loaded"))
    monkeypatch.setattr("recipes.data.sets.load", lambda spec: pytest.fail("loaded"))
    each_refused(capsys, name, flag_of(field), bad("configurations"))


def test_an_output_that_can_be_made_leaves_nothing_before_the_run(capsys):
    os.makedirs("kept")
    for folder in ("a/b/c", "kept/d"):
        refused(capsys, "progressive", "--output-dir", folder, "--teacher", "nowhere/at.safetensors")
    assert os.listdir(".") == ["kept"] and not os.listdir("kept")


def test_a_pipeline_that_lacks_a_weight_is_refused_where_diffusers_draws_it_at_random(tmp_path, capsys):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from safetensors.torch import load_file, save_file

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained("whole")
    path = "whole/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    line = refused(capsys, "sample", "--model", "whole", "--steps", 1)
    assert "1 weights of unet are missing, such as conv_out.bias" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("npz", "a header that lies", r"says uint8 \(1000000000000, 8, 8, 1\) and has 256 bytes"),
        ("npz", "labels of objects", "holds Python objects, which are not unpickled"),
        ("bombs", "npz labels", "labels.npy would grow from"),
        ("bombs", "bomb.tar.gz", "unpacks to more than 100 times"),
        ("bombs", "large.tar", "a file, of 1,000,000,000,000 bytes; accepted are whole files up to"),
        ("bombs", "sparse.tar", "sparse, of 8,589,934,591 bytes"),
        ("bombs", "names of braces", r"names 1e\+11 files; accepted are up to 100,000"),
        ("bombs", "large images", "images of side 4000; accepted are sides up to 1024"),
    ],
)
def test_a_bomb_is_found_by_what_it_says_and_not_by_what_it_does(bad, kind, name, message):
    with pytest.raises(ValueError, match=message):
        sets.load(str(bad(kind)[name]))
