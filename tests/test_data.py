import io
import json
import os
import struct
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import teachers
from distill import checkpoint
from distill.rng import seed_of
from distill.train import Shares
from recipes import data, decode, evaluate, latents, matching, progressive, shards
from teachers.codec import Codec
from teachers.unet import untrained

CPU = torch.device("cpu")


def png(value, size=8, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value,) * 3).save(file, "png")
    return file.getvalue()


def pack(path, samples):
    """A shard of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def some(n, found, shares=None, step=0, phase="p"):
    return list(islice(found.batches(shares or Shares(12), 0, phase, CPU)(step), n))


def seen(batches):
    """Which flat images of `png` these are."""
    return ((torch.cat([x0[:, 0, 0, 0] for x0, _ in batches]) + 1) * 127.5).round().int().tolist()


def write(folder, n, size=(12, 10), mode="RGB"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(n):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")


def test_sub_folders_are_classes_and_images_are_centre_cropped_squares(tmp_path):
    for name, n in (("cat", 3), ("ant", 2)):
        write(tmp_path / "set" / name, n)
    found = data.load(str(tmp_path / "set"))
    assert found.images.shape == (5, 3, 10, 10) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 1] and found.classes == 2
    pixels = np.asarray(Image.open(tmp_path / "set" / "cat" / "0.png"))
    assert (found.images[2].permute(1, 2, 0).numpy() == pixels[:, 1:11]).all()


def test_a_flat_folder_has_no_labels_grey_stays_grey_and_a_size_resizes(tmp_path):
    write(tmp_path / "grey", 4, mode="L")
    assert data.load(str(tmp_path / "grey")).images.shape == (4, 1, 10, 10) and data.load(str(tmp_path / "grey")).labels is None
    small = data.load(f"{tmp_path / 'grey'},size=5")
    assert small.images.shape == (4, 1, 5, 5)
    with pytest.raises(ValueError, match="12x10 is smaller than the 16x16 asked for"):
        data.load(f"{tmp_path / 'grey'},size=16")


def test_a_corrupt_image_is_reported_and_left_out_and_many_are_fatal(tmp_path, capsys):
    write(tmp_path / "set", 150)
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    assert len(data.load(str(tmp_path / "set")).images) == 150
    assert "007.png cannot be read and is left out" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / "set" / f"bad{i}.png").write_bytes((tmp_path / "set" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"4 of 154 images cannot be read, the first is .*007\.png"):
        data.load(str(tmp_path / "set"))


def test_a_folder_without_images_and_unknown_specs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        data.load(str(tmp_path))
    for spec in ("nowhere", "cifar10", f"mnist:{tmp_path},downlod", f"{tmp_path},side=3"):
        with pytest.raises(ValueError, match="accepted are 'digits'"):
            data.load(spec)


def test_torchvisions_sets_are_read_from_their_root_and_not_fetched_unasked(tmp_path):
    with pytest.raises(ValueError, match=f"write mnist:{tmp_path},download to fetch it"):
        data.load(f"mnist:{tmp_path}")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 6), ("t10k", 2)):
        pixels = np.arange(n * 784, dtype=np.uint8).reshape(n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + bytes(range(n)))
    found = data.load(f"mnist:{tmp_path}")
    assert found.images.shape == (6, 1, 28, 28) and found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.images[1, 0, 0, 0] == 784 % 256


def test_every_process_draws_its_own_rows_of_one_batch():
    found = data.load("digits")
    whole = next(iter(found.batches(Shares(12), 0, "p", torch.device("cpu"))(5)))[0]
    parts = [next(iter(found.batches(Shares(12, 3, rank), 0, "p", torch.device("cpu"))(5)))[0] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_batch_is_the_images_that_the_seed_draws_in_minus_one_to_one():
    found = data.load("digits")
    x0, cond = some(1, found, step=7)[0]
    index = torch.randint(len(found.images), (12,), generator=torch.Generator().manual_seed(seed_of(0, "p", 7, "data")))
    assert torch.equal(x0, found.images[index].float() / 127.5 - 1) and torch.equal(cond["labels"], found.labels[index])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_read_as_written_and_batches_are_those_of_the_same_images_in_memory(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    save(tmp_path / "set.npz", images=images, labels=np.arange(40) % 4, captions=np.array([f"image {i}" for i in range(40)]))
    found = data.load(str(tmp_path / "set.npz"))
    assert found.shape == (3, 6, 5) and found.classes == 4 and found.captions[39] == "image 39"
    assert (found.images.permute(0, 2, 3, 1).numpy() == images).all()
    held = replace(found, images=found.images.contiguous().clone())
    x0, same = some(1, found)[0][0], some(1, held)[0][0]
    assert torch.equal(x0, same) and x0.stride() == same.stride()


def test_stored_npz_images_stay_in_the_file_and_writing_to_them_does_not_change_it(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, labels=np.arange(5), images=np.full((5, 4, 4, 3), 77, np.uint8))
    found = data.load(str(path))
    before = path.read_bytes()
    at = before.index(bytes([77] * 240))
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\x05")
    assert found.images[0, 0, 0, 0] == 5 and found.images[0, 1, 0, 0] == 77
    found.images[1] = 9
    assert path.read_bytes()[at + 1 :] == before[at + 1 :]


def test_mapped_images_come_at_5000_a_second_and_more(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((5000, 32, 32, 3), np.uint8))
    found = data.load(str(tmp_path / "set.npz"))
    some(2, found, Shares(128))
    began = time.perf_counter()
    some(40, found, Shares(128))
    assert 40 * 128 / (time.perf_counter() - began) > 5000


def test_flip_mirrors_about_half_and_nothing_else_and_not_the_images_that_are_measured():
    plain, flipped = data.load("digits"), data.load("digits,flip")
    (x, cond), (y, other) = some(1, plain, Shares(400))[0], some(1, flipped, Shares(400))[0]
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) | mirrored).all() and 150 < mirrored.sum() < 250
    assert torch.equal(cond["labels"], other["labels"]) and torch.equal(plain.images, flipped.images)
    parts = [some(1, flipped, Shares(400, 2, rank))[0][0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), y)


def test_worker_processes_decode_to_the_bits_of_threads(tmp_path, monkeypatch):
    write(tmp_path / "set", 12, (16, 16))
    threads = data.load(f"{tmp_path / 'set'},size=7")
    monkeypatch.setattr(decode, "PROCESSES_FROM", 2)
    monkeypatch.setattr("eval.metrics.cores", lambda: 2)
    started = []
    monkeypatch.setattr(
        decode, "ProcessPoolExecutor", lambda *a, pool=decode.ProcessPoolExecutor: started.append(a) or pool(*a)
    )
    assert torch.equal(data.load(f"{tmp_path / 'set'},size=7").images, threads.images) and started


def test_braces_are_written_out():
    assert shards.expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert shards.expand("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]


def test_shards_give_images_with_classes_and_captions_from_any_of_their_files(tmp_path):
    pack(tmp_path / "a-0.tar", {"k/0.png": png(0), "k/0.cls": b"2", "k/0.txt": b"a cat\n", "k/0.other": b"?"})
    pack(
        tmp_path / "a-1.tar", {"1.json": json.dumps({"label": 1, "caption": "a dog"}).encode(), "1.jpg": png(1), "2.txt": b"no"}
    )
    for pattern in ("a-{0..1}.tar", "a-*.tar", "a-{0,1}.tar,size=4"):
        found = data.load(f"wds:{tmp_path / pattern}")
        assert found.labels.tolist() == [2, 1] and found.captions == ["a cat", "a dog"] and found.classes == 3
        assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert found.shape == (1, 4, 4)


def test_shards_that_are_missing_or_torn_or_hold_no_number_are_refused_by_name(tmp_path):
    pack(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"two"})
    with pytest.raises(ValueError, match=r"a\.tar/0: .*accepted are \.cls with a number"):
        data.load(f"wds:{tmp_path / 'a.tar'}")
    with pytest.raises(ValueError, match=r"there is no .*b-1\.tar; accepted is"):
        data.load(f"wds:{tmp_path / 'b-{1..2}.tar'}")
    with pytest.raises(ValueError, match="no file is named so"):
        data.load(f"wds:{tmp_path / 'b-*.tar'}")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"a\.tar: not a whole tar file"):
        data.load(f"wds:{tmp_path / 'a.tar'}")


@pytest.fixture
def streamed(tmp_path):
    """24 flat images of grey 0, ..., 23 in four shards, labelled by their parity, through a buffer of 8."""
    for shard in range(4):
        names = range(6 * shard, 6 * shard + 6)
        pack(
            tmp_path / f"s-{shard}.tar", {f"{i}.{k}": v for i in names for k, v in (("png", png(i)), ("cls", b"%d" % (i % 2)))}
        )
    return data.load(f"wds:{tmp_path}/s-{{0..3}}.tar,stream=8,classes=2")


def test_a_stream_shows_every_image_once_a_pass_shuffled_and_with_its_own_label(streamed):
    assert streamed.images[:, 0, 0, 0].tolist() == list(range(8)) and streamed.classes == 2
    batches = some(8, streamed, Shares(6))
    order = seen(batches)
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and order[:24] != sorted(order[:24]) != order[24:]
    assert torch.cat([cond["labels"] for _, cond in batches]).tolist() == [i % 2 for i in order]
    assert [i for _, images, _, _ in streamed.walk(5) for i in images[:, 0, 0, 0].tolist()] == list(range(24))


def test_processes_stream_parts_that_do_not_overlap(streamed):
    parts = [seen(some(4, streamed, Shares(6, 2, rank))) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(24))
    with pytest.raises(ValueError, match="fewer shards than the 5 processes"):
        some(1, streamed, Shares(5, 5, 4))


def test_a_stream_continues_from_a_step_with_the_same_bits(streamed):
    whole = some(8, streamed, Shares(6, microbatch=3))
    for (x, cond), (y, other) in zip(whole[6:], some(2, streamed, Shares(6, microbatch=3), step=3), strict=True):
        assert torch.equal(x, y) and torch.equal(cond["labels"], other["labels"])


def test_a_stream_and_a_set_of_captions_are_labelled_by_the_line_of_each(tmp_path):
    prompts = ["zero", "one", "two"]
    pack(tmp_path / "s.tar", {f"{i}.{k}": v for i in range(9) for k, v in (("png", png(i)), ("txt", prompts[i % 3].encode()))})
    for options in ("", ",stream=3"):
        found = data.load(f"wds:{tmp_path}/s.tar{options}").captioned(["nothing", *prompts])
        batches = some(4, found, Shares(6))
        assert torch.cat([cond["labels"] for _, cond in batches]).tolist() == [1 + i % 3 for i in seen(batches)]
        assert found.classes == 4
    with pytest.raises(ValueError, match=r"s.tar/2: the caption 'two' is none of the teacher's 2 prompts"):
        some(2, data.load(f"wds:{tmp_path}/s.tar,stream=2").captioned(prompts[:2]), Shares(6))


def test_in_a_stream_another_image_stands_for_a_corrupt_one_and_more_than_1_percent_are_fatal(tmp_path, capsys):
    bad = {3, 300, 301}
    pack(tmp_path / "s.tar", {f"{i}.png": b"no image" if i in bad else png(i % 250) for i in range(500)})
    found = data.load(f"wds:{tmp_path}/s.tar,stream=100")
    whole = some(10, found, Shares(50))
    assert "s.tar/300 cannot be read and is left out" in capsys.readouterr().err
    assert all(len(x0) == 50 for x0, _ in whole) and torch.equal(whole[7][0], some(1, found, Shares(50), step=7)[0][0])
    pack(tmp_path / "s.tar", {f"{i}.png": b"no image" if 200 < i < 220 else png(i % 250) for i in range(500)})
    with pytest.raises(ValueError, match=r"\d\d of 1000 images cannot be read, the first is .*s\.tar/2\d\d"):
        some(20, found, Shares(50))


def test_a_labelled_stream_asks_how_many_classes_there_are(tmp_path, streamed):
    with pytest.raises(ValueError, match="add classes=N"):
        data.load(f"wds:{tmp_path}/s-{{0..3}}.tar,stream=8")
    with pytest.raises(ValueError, match="label 1: accepted are 0 to classes - 1"):
        data.load(f"wds:{tmp_path}/s-{{0..3}}.tar,classes=1")


def test_a_folder_streams_what_it_holds(tmp_path):
    for i in range(9):
        (tmp_path / "set" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / str(i % 3) / f"{i}.png").write_bytes(png(i))
    found = data.load(f"{tmp_path / 'set'},stream=4")
    parts = [some(1, found, Shares(9, 3, rank)) for rank in range(3)]
    assert sorted(seen([batch for part in parts for batch in part])) == list(range(9)) and found.classes == 3
    assert [cond["labels"].tolist() for part in parts for _, cond in part] == [[i % 3 for i in seen(part)] for part in parts]


def test_a_saved_set_of_the_datasets_package_is_read_offline_with_its_classes_and_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b", "c"]), "text": datasets.Value("string")}
    )
    rows = {"img": [Image.open(io.BytesIO(png(i))) for i in range(5)], "fine_label": [0, 1, 0, 1, 1], "text": list("vwxyz")}
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(str(tmp_path / "saved"))
    found = data.load(f"hf:{tmp_path / 'saved'}")
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and found.labels.tolist() == [0, 1, 0, 1, 1]
    assert found.classes == 3 and found.captions == list("vwxyz")
    assert data.load(f"hf:{tmp_path / 'saved'},split=test,image=img,label=fine_label,size=3").images[0, 0, 0, 0] == 3
    stream = data.load(f"hf:{tmp_path / 'saved'},stream=3")
    assert sorted(seen(some(1, stream, Shares(5)))) == [0, 1, 2, 3, 4]
    for option, message in (
        ("image=pixels", "no column 'pixels': image=... accepts img, fine_label, text"),
        ("image=text", "column 'text' holds Value, no images"),
        ("label=text", "text is 'v', label=... accepts a column of class numbers"),
        ("split=validation", "KeyError: 'validation'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(f"hf:{tmp_path / 'saved'},{option}")


def test_a_set_of_the_hub_streams_in_parts_that_do_not_overlap(tmp_path):
    pytest.importorskip("datasets")
    for i in range(8):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
    found = data.load(f"hf:{tmp_path / 'set'},stream=4")
    parts = [seen(some(2, found, Shares(4, 2, rank))) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(8)) and found.classes == 2


def test_without_the_datasets_package_or_a_network_one_line_says_so(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"hf:nobody/nothing, split=train: .*is there a network") as error:
        data.load("hf:nobody/nothing")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'fewstep\[hf\]'"):
        data.load("hf:cifar10")


class Halves(nn.Module):
    """An autoencoder of half the side."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def encode(self, x):
        return type("Encoded", (), {"latents": nn.functional.avg_pool2d(x, 2) * self.gain})

    def decode(self, z):
        return type("Decoded", (), {"sample": nn.functional.interpolate(z / self.gain, scale_factor=2)})


@pytest.fixture
def latent(monkeypatch):
    """A latent model of 8x8 digits, which every spec of a teacher names."""
    model = replace(untrained((1, 4, 4), 10, (8, 16), 1, 0), codec=Codec(Halves(), 0.5, 0.1))
    monkeypatch.setattr(teachers, "load", lambda spec: model)
    return model


def test_latents_of_a_set_are_those_of_its_codec_and_batches_take_them_as_they_are(latent, tmp_path):
    latents.main(["--output-dir", str(tmp_path / "l"), "--dtype", "float32", "--shard-images", "1000", "--threads", "1"])
    index = json.loads((tmp_path / "l" / "index.json").read_text())
    assert (index["count"], index["scale"], index["shift"], len(index["shards"])) == (1797, 0.5, 0.1, 2)
    digits, found = data.load("digits"), data.load(str(tmp_path / "l"))
    assert torch.allclose(found.images, (nn.functional.avg_pool2d(digits.x0(slice(None)), 2) - 0.1) * 0.5, atol=1e-6)
    assert torch.equal(found.labels, digits.labels) and found.shape == (1, 4, 4)
    (x0, cond), (pixels, _) = some(1, found)[0], some(1, digits)[0]
    assert torch.allclose(latent.decode(x0), nn.functional.interpolate(nn.functional.avg_pool2d(pixels, 2), scale_factor=2))
    assert x0.dtype == torch.float32 and len(cond["labels"]) == 12
    with pytest.raises(SystemExit) as exit:
        latents.main(["--output-dir", str(tmp_path / "l")])
    assert exit.value.code == 2


def test_captions_go_with_latents_and_a_shard_that_was_changed_is_refused(latent, tmp_path):
    np.savez(
        tmp_path / "set.npz", images=np.zeros((70, 8, 8, 1), np.uint8), labels=np.arange(70) % 10, captions=list("ab" * 35)
    )
    latents.main(["--data", str(tmp_path / "set.npz"), "--output-dir", str(tmp_path / "l"), "--preset", "smoke"])
    found = data.load(str(tmp_path / "l"))
    assert found.captions == list("ab" * 32) and found.images.dtype == torch.float16
    checkpoint.save(tmp_path / "l" / "latents-00000.safetensors", {"latents": torch.zeros(3, 1, 4, 4)}, {})
    with pytest.raises(
        ValueError, match=r"latents are torch.float32 \(3, 1, 4, 4\), the index has torch.float16 \(64, 1, 4, 4\)"
    ):
        data.load(str(tmp_path / "l"))


def test_latents_train_only_models_with_the_autoencoder_they_were_made_by(latent, tmp_path):
    latents.main(["--output-dir", str(tmp_path / "l"), "--preset", "smoke"])
    found = data.load(str(tmp_path / "l"))
    matching.check_match(latent, found, training=True)
    for codec, message in (
        (Codec(Halves(), 0.25, 0.1), "latents with scale 0.5, the teacher's has 0.25"),
        (Codec(Halves(2.0), 0.5, 0.1), "latents with codec_sha256"),
        (None, "the teacher works on images"),
    ):
        with pytest.raises(ValueError, match=message):
            matching.check_match(replace(latent, codec=codec), found)
    matching.check_match(latent, data.load("digits"))
    with pytest.raises(ValueError, match=r"recipes/latents\.py makes latents"):
        matching.check_match(latent, data.load("digits"), training=True)


def test_measuring_against_latents_names_the_reference_it_needs(latent, tmp_path, capsys):
    latents.main(["--output-dir", str(tmp_path / "l"), "--preset", "smoke"])
    for recipe in (evaluate, progressive):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            recipe.main(["--data", str(tmp_path / "l"), "--output-dir", str(tmp_path / "out"), "--threads", "1"])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and "no pixels to measure against: name a stored --reference" in err
        assert err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bad_data_end_in_one_line_with_exit_code_2_and_nothing_written(tmp_path, capsys):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "float.npz", images=images.astype(np.float32))
    np.savez(tmp_path / "short.npz", images=images, labels=np.arange(3))
    np.savez(tmp_path / "text.npz", images=images, labels=np.array(list("abcd")))
    np.savez(tmp_path / "minus.npz", images=images, labels=np.arange(-1, 3))
    np.savez(tmp_path / "none.npz", pictures=images)
    np.savez(tmp_path / "pickle.npz", images=np.array([{}], object))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:300])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "small", 2)
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep" / "0.png")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "index.json").write_text(json.dumps({"format": "fewstep-latents/1", "count": 3}))
    for spec, message in {
        "float.npz": "images are float32", "short.npz": "labels of int64 and shape (3,)", "text.npz": "labels of <U1",
        "minus.npz": "label -1", "none.npz": "images", "pickle.npz": "allow_pickle", "torn.npz": "accepted are images uint8",
        "empty.npz": "accepted are images uint8", "empty": "holds no images", "small,size=64": "0.png: 12x10 is smaller",
        "small,size=0": "'size' is no option", "small,flop": "'flop' is no option of folder", "short.npz,size=4": "of npz (flip)",
        "deep": "mode I;16: accepted are 8 bits", "gone": "accepted are 'digits'", "index": "no index of latents",
    }.items():  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            evaluate.main(["--data", f"{tmp_path / spec}", "--output-dir", str(tmp_path / "out"), "--threads", "1"])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and message in err and err.count("\n") == 1, (spec, err)
    assert not os.path.exists(tmp_path / "out")
