"""Reading a file runs no code that the file brings or names."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import teachers
from distill import files
from eval import reference
from eval.features import Extractor
from recipes import evaluate, export, probe, progressive, sample
from recipes.data import sets
from teachers.networks import factory

PLANTED = """
from pathlib import Path
from torch import nn

Path({marker!r}).touch()


def make(**options):
    return nn.Identity()
"""


class Payload:
    """Create a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Return the file that a planted module or pickle makes when its code runs. The module's name is "planted"."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "planted.py").write_text(PLANTED.format(marker=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(factory, "_TRUSTED", set())
    sys.modules.pop("planted", None)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("planted", None)


def planted_model(path: Path, name: str = "planted:make") -> str:
    """Write a model's file that names a factory outside of this project."""
    tensors, description = files.load(Path(teachers.__path__[0]) / "digits" / "teacher.safetensors")
    description["network"] = {"family": "module", "config": {"factory": name, "arguments": {}}}
    files.save(path, tensors, description)
    return str(path)


def refused(capsys, main, line: str) -> str:
    """Run a recipe and return its single line of error."""
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and lines[-1].startswith("error: ") and len(lines[-1]) < 300, lines
    return lines[-1]


@pytest.mark.parametrize("name", ["os:system", "planted:make", "posixpath:join", "builtins:exec", ":", "planted"])
def test_a_file_that_names_a_factory_is_refused_before_its_module_is_imported(marker, name):
    with pytest.raises(ValueError, match="--trust"):
        teachers.load(planted_model(Path("model.safetensors"), name))
    assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("adapters", [1, 3])
def test_a_factory_inside_adapters_is_refused_too(marker, adapters):
    planted_model(Path("model.safetensors"))
    tensors, description = files.load("model.safetensors")
    for _ in range(adapters):
        description["network"] = {"family": "adapter", "config": {"kind": "negative", "network": description["network"]}}
    files.save("model.safetensors", tensors, description)
    with pytest.raises(ValueError, match="--trust planted"):
        teachers.load("model.safetensors")
    assert not marker.exists()


RECIPES = {
    "teacher": (progressive.main, "--preset smoke --teacher model.safetensors --output-dir out"),
    "experts": (progressive.main, "--preset smoke --teacher experts:digits|model.safetensors,logsnr=0 --output-dir out"),
    "student": (evaluate.main, "--preset smoke --model model.safetensors --output-dir out"),
    "run": (evaluate.main, "--preset smoke --model run --output-dir out"),
    "stage": (sample.main, "--model run --steps 4 --output out.png"),
    "export": (export.main, "--model run --output-dir out"),
    "probe": (probe.main, "--model model.safetensors"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_refuses_a_planted_file_in_one_line_that_names_the_flag(marker, capsys, recipe):
    main, line = RECIPES[recipe]
    planted_model(Path("model.safetensors"))
    planted_model(Path("run/student.safetensors"))
    planted_model(Path("run/stages/4/student.safetensors"))
    assert "--trust planted" in refused(capsys, main, line)
    assert not marker.exists() and not Path("out").exists()


def test_trust_allows_the_named_module_and_its_submodules_alone(marker):
    model = planted_model(Path("model.safetensors"))
    for other in ("plante", "planted.sub", "planted:other", "os"):
        teachers.trust(other)
        with pytest.raises(ValueError, match="--trust"):
            teachers.load(model)
    assert not marker.exists()
    teachers.trust("planted")
    with pytest.raises(ValueError, match="weights left over"):  # the factory ran, and its network has no weights
        teachers.load(model)
    assert marker.exists()


def test_the_flag_trusts_a_module_for_one_command(marker, capsys):
    planted_model(Path("model.safetensors"))
    assert "weights left over" in refused(capsys, probe.main, "--model model.safetensors --trust planted")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.scale * x


SPEC = "test_security:Tiny,schedule=cosine,prediction=x0,shape=1x8x8"


def test_a_factory_that_the_user_names_is_trusted_for_its_students(marker):
    teachers.save("student.safetensors", teachers.load(SPEC))
    assert isinstance(teachers.load("student.safetensors").denoiser.net, Tiny)
    factory._TRUSTED.clear()  # as in a new process
    with pytest.raises(ValueError, match="--trust test_security"):
        teachers.load("student.safetensors")


@pytest.mark.slow
def test_a_continued_run_refuses_a_planted_stage(marker, capsys):
    sizes = "--threads 1 --preset smoke --start-steps 4 --images-per-stage 128 --images 40 --chunk 40 --sweep-steps 1 --output-dir out"
    progressive.main(sizes.split())
    planted_model(Path("out/stages/2/student.safetensors"))
    assert "--trust planted" in refused(capsys, progressive.main, sizes)
    assert not marker.exists()


def pickled(path: Path, marker: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"weight": Payload(marker)}))
    return str(path)


def saved_by_torch(path: Path, marker: Path) -> str:
    torch.save({"weight": Payload(marker)}, path)
    return str(path)


def disguised_as_torchscript(path: Path, marker: Path) -> str:
    """Write torch's own archive with the member by which torch recognises TorchScript."""
    saved_by_torch(path, marker)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", pickle.dumps(Payload(marker)))
    return str(path)


def object_array(path: Path, marker: Path) -> str:
    whole = np.array([Payload(marker)], dtype=object)
    with open(path, "wb") as file:
        np.savez(file, mu=whole, sigma=whole, images=whole, labels=whole, arr_0=whole)
    return str(path)


WRITERS = (pickled, saved_by_torch, disguised_as_torchscript, object_array)


def test_the_planted_files_would_run_code(marker):
    """The marker appears where such a file is unpickled, so that the tests below can fail."""
    for write in (pickled, saved_by_torch):
        path = write(Path("bad.pt"), marker)
        pickle.loads(Path(path).read_bytes()) if write is pickled else torch.load(path, weights_only=False)
        assert marker.exists()
        marker.unlink()
    np.load(object_array(Path("bad.npz"), marker), allow_pickle=True)["mu"]
    assert marker.exists()


READERS = {
    "a model": teachers.load,
    "its weights": lambda path: teachers.load(f"{SPEC},weights={path}"),
    "guided weights": lambda path: teachers.load(f"guided:{path},size=8,head_channels=8"),
    "inception's weights": lambda path: Extractor.create("inception-v3-compat", path),
    "VGG's weights": lambda path: Extractor.create("vgg16", path),
    "CLIP's weights": lambda path: Extractor.create("clip-vit-b-32", path),
    "the digits' weights": lambda path: Extractor.create("digits", path),
    "an extractor": Extractor.create,
    "a reference": lambda path: reference.load(Path(path), Extractor.create("digits")),
    "data": sets.load,
    "a checkpoint": files.load,
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".npz", ".bin"])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_unpickles(marker, reader, write, suffix):
    path = write(Path(f"bad{suffix}"), marker)
    with pytest.raises(ValueError):
        READERS[reader](path)
    assert not marker.exists()


def test_extractor_weights_reach_torch_fidelity_as_tensors_alone(marker, monkeypatch):
    """The library unpickles a file that was written here; its own downloads are held to tensors as well."""
    seen = {}

    def create(name, layers, **options):
        seen["path"] = options["feature_extractor_weights_path"]
        seen["tensors"] = torch.load(seen["path"], weights_only=False)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(saved_by_torch(Path("download.pth"), marker), weights_only=False)
        return nn.Identity()

    from eval import fidelity

    monkeypatch.setattr(fidelity, "create_feature_extractor", create)
    torch.save({"weight": torch.arange(3.0)}, "weights.pth")
    fidelity.Registered("inception-v3-compat", "weights.pth")
    assert torch.equal(seen["tensors"]["weight"], torch.arange(3.0)) and not Path(seen["path"]).exists()
    assert not marker.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_of_clip_are_read_from_a_state_dict(tmp_path):
    from eval import fidelity

    tensors = {
        "visual.conv1.weight": torch.randn(3, 2).half(),
        "visual.layers.0.a.b": torch.ones(2),
        "logit_scale": torch.ones(()),
    }
    torch.save(tensors, tmp_path / "clip.pt")
    with fidelity.tensors_alone("clip-vit-b-32", str(tmp_path / "clip.pt")) as path:
        read = torch.jit.load(path).state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)


def test_an_index_of_latents_that_names_a_factory_is_refused(marker):
    from recipes.common.checks import codec_of

    data = sets.load("digits")
    described = {"model": "planted:make,schedule=cosine,prediction=x0,shape=1x8x8", "codec_sha256": "0"}
    with pytest.raises(ValueError, match="--trust planted"):
        codec_of(type(data)(**(vars(data) | {"latents": described})))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["DiffusionPipeline", "AutoPipelineForText2Image", "utils", "AutoModel", "StableDiffusionPipeline"]
)
def test_a_file_cannot_name_another_class_as_its_autoencoder(marker, name):
    folder = Path("vae/vae")
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["planted", "make"]}))
    (folder / "config.json").write_text("{}")
    (folder / "planted.py").write_text((Path("site") / "planted.py").read_text())
    codec = teachers.codec.Codec(None, 1.0, 0.0, {"folder": "vae", "part": "vae", "class": name})
    with pytest.raises(ValueError, match="no network of diffusers"):
        codec.network  # noqa: B018
    assert not marker.exists()


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}


@pytest.mark.parametrize(
    "changed",
    [
        {"scheduler": ["planted", "make"]},
        {"unet": ["planted", "make"]},
        {"text_encoder": ["planted", "make"]},
        {"text_encoder": ["diffusers", "DiffusionPipeline"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"_class_name": ["planted", "make"]},
        {"tokenizer": [["planted"], "make"]},
    ],
)
def test_code_in_the_folder_of_a_pipeline_is_not_run(marker, changed):
    for part in ("unet", "scheduler", "text_encoder", "tokenizer", ""):
        folder = Path("pipeline") / part
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "planted.py").write_text((Path("site") / "planted.py").read_text())
        (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "planted.make"}}))
    (Path("pipeline") / "scheduler" / "scheduler_config.json").write_text("{}")
    (Path("pipeline") / "model_index.json").write_text(json.dumps(INDEX | changed))
    Path("prompts.txt").write_text("one")
    for spec in ("pipeline", "pipeline,prompts=prompts.txt"):
        with pytest.raises(ValueError):
            teachers.load(spec)
    assert not marker.exists()


def test_a_file_that_names_a_hub_id_causes_no_download(marker, monkeypatch):
    from diffusers import DiffusionPipeline

    asked = {}

    def download(where, **options):
        asked.update(options)
        raise OSError("not cached")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    codec = teachers.codec.Codec(None, 1.0, 0.0, {"folder": "owner/name", "part": "vae", "class": "AutoencoderKL"})
    with pytest.raises(ValueError, match="hf download owner/name"):
        codec.network  # noqa: B018
    assert asked["local_files_only"] and not asked["trust_remote_code"]


def test_an_index_of_latents_that_names_a_hub_id_causes_no_download(monkeypatch):
    from diffusers import DiffusionPipeline

    from recipes.common.checks import codec_of

    asked = {}
    monkeypatch.setattr("teachers.hub.reached", lambda *known: pytest.fail("the hub was asked"))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda where, **options: asked.update(options) or "nowhere")
    described = {"model": "owner/name", "codec_sha256": "0"}
    with pytest.raises(ValueError):
        codec_of(type(data := sets.load("digits"))(**(vars(data) | {"latents": described})))
    assert asked["local_files_only"]


NO_SOCKETS = """
import socket, sys

def refused(*args, **options):
    raise AssertionError(f"a socket was opened: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
from recipes import progressive

progressive.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_main_job_opens_no_connection(tmp_path):
    sizes = "--threads 1 --preset smoke --start-steps 2 --images-per-stage 128 --images 40 --chunk 40 --sweep-steps 1"
    command = [sys.executable, "-c", NO_SOCKETS, *sizes.split(), "--output-dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"})
    assert (tmp_path / "out" / "report.html").is_file()
