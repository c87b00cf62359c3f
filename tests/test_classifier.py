"""Feature extractors of grey images that recipes/classifier.py trains: their files, and what they are refused for."""

import re

import numpy as np
import pytest
import torch
from conftest import refuses
from test_bad_flags import refused

from distill import files
from eval import classifier
from eval.classifier import Classifier
from eval.features import Extractor
from recipes import classifier as recipe


def halves(count=160, height=12, width=10, channels=1):
    """Noisy images of three classes: bright above, bright below, and dark."""
    draw, labels = np.random.default_rng(0), np.arange(count) % 3
    images = draw.integers(0, 120, (count, height, width, channels), dtype=np.uint8)
    images[labels == 0, : height // 2] += 120
    images[labels == 1, height // 2 :] += 120
    return images, labels


@pytest.fixture
def trained(tmp_path, capsys):
    """The file of a classifier of `halves`, and what the recipe printed."""
    images, labels = halves()
    np.savez(tmp_path / "halves.npz", images=images, labels=labels)
    words = f"--data {tmp_path}/halves.npz --epochs 6 --batch-size 32 --threads 1 --output-dir {tmp_path}/out"
    recipe.main(words.split())
    return tmp_path / "out" / "features.safetensors", capsys.readouterr().out


def test_a_new_set_gets_an_extractor_that_describes_itself_and_tells_held_out_images_apart(trained):
    path, said = trained
    accuracy = float(re.search(r"accuracy on 32 held-out images: (\S+)", said)[1])
    record = files.load(path)[1]["classifier"]
    assert accuracy > 0.9 and record["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert (record["of"], record["size"], record["classes"]) == ("halves", [12, 10], 3) and f"--features {path}" in said
    images, labels = halves()
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = Extractor.create(str(path)).fits((1, 12, 10))(whole)
    assert found.fid.shape == (160, 64) and found.fid.mean(0).abs().max() < 1e-4 and (found.fid.std(0) - 1).abs().max() < 1e-4
    assert found.logits.shape == (160, 3) and (found.logits.argmax(1).numpy() == labels).mean() > 0.9


def test_the_embedded_file_named_as_a_file_gives_the_features_and_the_fingerprint_of_digits():
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    ours, theirs = Extractor.create(str(classifier.DIGITS)), Extractor.create("digits")
    assert torch.equal(ours(images).fid, theirs(images).fid) and torch.equal(ours(images).logits, theirs(images).logits)
    assert not ours.registered and set(ours.module.state_dict()) == set(files.load(classifier.DIGITS)[0])


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (16, 16), (28, 28), (32, 32), (12, 40)])
def test_a_classifier_of_any_size_takes_that_size_and_one_of_8x8_has_the_layers_of_the_embedded_one(size):
    features, logits = Classifier(size, 7).eval()(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert features.shape == (2, 64) and logits.shape == (2, 7)
    flat = next(layer for layer in Classifier(size).body if isinstance(layer, torch.nn.Linear)).in_features
    assert flat <= 64 * 16 and (size != (8, 8) or len(Classifier(size).body) == len(Classifier().body) == 8)


def test_images_of_another_size_than_the_extractors_are_refused(tmp_path):
    model = Classifier((16, 16))
    files.save(tmp_path / "f.safetensors", model.state_dict(), {"classifier": {"size": [16, 16], "classes": 10}})
    refuses("cannot take images of shape (1, 28, 28)", Extractor.create(str(tmp_path / "f.safetensors")).fits, (1, 28, 28))


@pytest.mark.parametrize(
    "record, message",
    [
        (None, "holds no classifier; accepted is a file that recipes/classifier.py wrote"),
        ([8, 8], "holds no classifier"),
        ({"size": [16]}, "holds no classifier"),
        ({"size": [16, 16.0]}, "holds no classifier"),
        ({"classes": True}, "holds no classifier"),
        ({"size": [16, 10**9]}, "a classifier of 16x1000000000 images: accepted are sides from 8 to 256"),
        ({"classes": 10**9}, "a classifier of 1000000000 classes: accepted are 2 to 10,000"),
        ({"classes": 11}, "2 weights of another shape: head.2.bias, head.2.weight"),
    ],
)
def test_a_file_that_is_no_classifier_is_refused(tmp_path, record, message):
    path = tmp_path / "f.safetensors"
    files.save(path, Classifier().state_dict(), {} if record is None else {"classifier": record})
    refuses(message, Extractor.create, str(path))
    path.write_bytes(path.read_bytes()[:100])
    refuses("not a whole safetensors file", Extractor.create, str(path))
    refuses("there is no such file", Extractor.create, str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"channels": 3},
            "has images of 3 channels; accepted are whole sets of grey images, and colour ones with the option ,grey",
        ),
        ({"height": 7}, "a classifier of 7x10 images: accepted are sides from 8 to 256"),
        ({"count": 79}, "has 79 images, and a fifth is held out: accepted are"),
        ({"labels": None}, "has no labels; accepted are sets with labels"),
        ({"labels": 0}, "a classifier of 1 classes: accepted are 2 to 10,000"),
    ],
)
def test_sets_that_no_classifier_can_learn_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, changed, message
):
    images, labels = halves(**{k: v for k, v in changed.items() if k != "labels"})
    given = {} if changed.get("labels", labels) is None else {"labels": labels * changed.get("labels", 1)}
    np.savez(tmp_path / "set.npz", images=images, **given)
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "classifier", "--data", "set.npz", "--output-dir", "out")


def test_colour_images_are_learned_as_grey_ones(tmp_path, capsys):
    images, labels = halves(channels=3)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    recipe.main(f"--data {tmp_path}/set.npz,grey --epochs 1 --batch-size 64 --threads 1 --output-dir {tmp_path}/out".split())
    assert files.load(tmp_path / "out" / "features.safetensors")[1]["classifier"]["of"] == "set 12x10 grey"
