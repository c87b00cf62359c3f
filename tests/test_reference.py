from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import refuses

import teachers
from distill import files
from eval import reference
from eval.features import Extractor
from eval.metrics import Features, measure
from teachers.codec import Codec
from teachers.digits import digits


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    images, extractor = digits()[0][:300], Extractor.create("digits")
    made, identity = reference.of_images(images, "digits", extractor, 64, Accelerator(cpu=True), path)
    return path, images, extractor, made, identity


def test_a_reference_is_the_features_of_all_images_in_order(stored):
    _, images, extractor, made, identity = stored
    assert torch.allclose(made.features, extractor(images).fid, atol=1e-5)
    assert identity.images == 300 and identity.features == "digits"


def test_a_stored_reference_is_read_back_with_its_identity_and_not_computed_again(stored, monkeypatch):
    path, images, extractor, made, identity = stored
    monkeypatch.setattr(reference, "extract", lambda *a: pytest.fail("extracted again"))
    again, theirs = reference.of_images(images, "digits", extractor, 64, Accelerator(cpu=True), path)
    assert torch.equal(again.features, made.features) and theirs == identity
    assert reference.load(path, extractor)[1] == identity


def test_other_images_than_those_of_the_stored_reference_are_refused(stored):
    path, images, extractor, *_ = stored
    for other, message in ((images[:299], "images 300, here it is 299"), (images.flip(0), "data_sha256 ' ... ', here it is '")):
        call = (reference.of_images, other, "digits", extractor, 64, Accelerator(cpu=True), path)
        refuses(f"this reference has {message} ... : they must agree", *call)


def test_another_extractor_is_refused_by_name_and_by_weights(stored, tmp_path):
    path, _, extractor, *_ = stored
    other = Extractor("clip-vit-b-32", extractor.module)
    refuses("has features 'digits', here it is 'clip-vit-b-32'", reference.load, path, other)
    changed = Extractor.create("digits")
    next(changed.module.parameters()).data.add_(1)
    refuses("has features_sha256", reference.load, path, changed)


def test_files_of_another_kind_dtype_or_shape_are_refused(stored, teacher, tmp_path):
    tensors, description = files.load(stored[0])
    description.pop("format")
    files.save(tmp_path / "half.safetensors", {"features": tensors["features"].half()}, description)
    teachers.save(tmp_path / "model.safetensors", teacher)
    single = np.eye(4, dtype=np.float32)
    np.savez(tmp_path / "single.npz", mu=single[0], sigma=single)
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(3))
    np.savez(tmp_path / "names.npz", mean=np.zeros(4))
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04.")
    for name, message in {
        "half.safetensors": "features are torch.float16, torch.float32 is accepted",
        "model.safetensors": "a model, no reference",
        "single.npz": "mu is float32 and sigma float32; accepted is an .npz with mu [D] in float32 or float64",
        "shape.npz": "mu has shape (4,) and sigma (3, 3)",
        "names.npz": "mu is not a file in the archive",
        "objects.npz": "allow_pickle=False",
        "edm.pkl": "a pickle, which can run code",
    }.items():
        refuses(message, reference.load, tmp_path / name, stored[2])


def test_statistics_of_the_fields_npz_files_give_the_fid_of_the_features_they_came_from(stored, tmp_path):
    _, _, extractor, made, _ = stored
    statistics = made.statistics
    np.savez(tmp_path / "cifar10-32x32.npz", mu=statistics["mu"].astype(np.float64), sigma=statistics["sigma"])
    inception = Extractor("inception-v3-compat", extractor.module)
    given, identity = reference.load(tmp_path / "cifar10-32x32.npz", inception)
    generated = Features(made.features + 0.1 * torch.randn_like(made.features))
    whole, alone = measure(generated, made), measure(generated, given)
    assert alone["fid"] == whole["fid"] and alone["fid_interval"] == whole["fid_interval"]
    assert alone["kid"] is None and alone["precision"] is None and identity.images == 0
    assert given.floor(100) is None
    path = tmp_path / "cifar10-32x32.npz"
    refuses("has features 'inception-v3-compat', here it is 'digits'", reference.load, path, extractor)


def test_the_floor_of_a_decoder_is_0_for_a_perfect_codec_and_positive_for_a_coarse_one(teacher, stored):
    class Vae(torch.nn.Module):
        def __init__(self, coarse):
            super().__init__()
            self.coarse = coarse

        def encode(self, x):
            return SimpleNamespace(latents=torch.nn.functional.avg_pool2d(x, 2) if self.coarse else x)

        def decode(self, z):
            return SimpleNamespace(sample=z.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.coarse else z)

    _, images, extractor, made, _ = stored
    floors = [
        reference.decoder_floor(replace(teacher, codec=Codec(Vae(coarse))), images, extractor, made, Accelerator(cpu=True))
        for coarse in (False, True)
    ]
    assert abs(floors[0]) < 1e-3 and floors[1] > 1
