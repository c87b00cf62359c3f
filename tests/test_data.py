import io
import json
import struct
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import here, refuses
from PIL import Image
from torch import nn

import teachers
from distill import files
from distill.images import from_uint8
from distill.rng import seed_of
from distill.train import BatchSplit
from eval.features import fingerprint
from recipes import evaluate, latents, progressive
from recipes.common import checks
from recipes.data import decode, sets, spec, webdataset
from teachers.codec import Codec
from teachers.students import untrained


def png(value):
    """A flat grey 8x8 image, encoded."""
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "png")
    return file.getvalue()


def pack(path, samples):
    """Write a shard of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def shard(path, numbers, **contents):
    """Write a shard with a sample per number: {extension: function of the number}."""
    pack(path, {f"{i}.{extension}": content(i) for i in numbers for extension, content in contents.items()})


def write(folder, n, shape=(10, 12, 3)):
    """Write n random images [H, W, C]."""
    folder.mkdir(parents=True)
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)):
        Image.fromarray(image).save(folder / f"{i}.png")


def some(n, found, split=None, step=0):
    """The first n batches from a step on."""
    microbatches = found.batches(split or BatchSplit(12), 0, "p", torch.device("cpu"), lambda labels: {"labels": labels})
    return list(islice(microbatches(step), n))


def seen(batches):
    """The grey values of flat images."""
    return ((torch.cat([x0[:, 0, 0, 0] for x0, _ in batches]) + 1) * 127.5).round().int().tolist()


def labels_of(batches):
    return torch.cat([cond["labels"] for _, cond in batches]).tolist()


def test_sub_folders_are_classes_and_images_are_centre_cropped_squares(tmp_path):
    for name, n in (("cat", 3), ("ant", 2)):
        write(tmp_path / name, n)
    found = sets.load(str(tmp_path))
    assert found.images.shape == (5, 3, 10, 10) and found.images.dtype == torch.uint8
    assert found.labels.tolist() == [0, 0, 1, 1, 1] and found.classes == 2
    pixels = np.asarray(Image.open(tmp_path / "cat" / "0.png"))
    assert (found.images[2].permute(1, 2, 0).numpy() == pixels[:, 1:11]).all()


def test_a_flat_folder_has_no_labels_grey_stays_grey_and_a_size_resizes(tmp_path):
    write(tmp_path / "grey", 4, (10, 12))
    found, small = sets.load(f"{tmp_path / 'grey'}"), sets.load(f"{tmp_path / 'grey'},size=5")
    assert found.images.shape == (4, 1, 10, 10) and small.images.shape == (4, 1, 5, 5) and found.labels is None


def test_a_corrupt_image_is_reported_and_left_out_and_many_are_fatal(tmp_path, capsys):
    write(tmp_path / "set", 150)
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    assert len(sets.load(str(tmp_path / "set")).images) == 150
    assert "007.png cannot be read and is left out" in capsys.readouterr().err
    for i in range(3):
        (tmp_path / "set" / f"bad{i}.png").write_bytes((tmp_path / "set" / "0.png").read_bytes()[:60])
    refuses("4 of 154 images cannot be read, the first is ... 007.png", sets.load, str(tmp_path / "set"))


def test_a_wrong_spec_ends_in_a_short_message_with_the_nearest_accepted():
    for text, message in {
        "nowhere": "unknown data 'nowhere', no such file or folder: accepted are digits, FOLDER, FILE.npz and more",
        "cifar10": "accepted are cifar10:ROOT, digits, FOLDER and more; --help data lists all",
        "mnist:ROOT,downlod": "'downlod' is no option of mnist; accepted are bits=..., box=..., download, flip, ... --help data lists all",
        "digits,size=3": "'size' is no option of digits; accepted are bits=..., box=..., flip, grey, labels=..., pad=...",
        "wds:a.tar,size=0": "option size is '0'; accepted are whole numbers from 1",
        "hf:a,split": "option split has no value; accepted is split=...",
        "digits,flip=1": "option flip has the value '1'; accepted is flip alone",
    }.items():
        assert len(refuses(message, sets.load, text)) < 250


def test_every_form_and_option_has_a_line_of_help():
    forms = [line.partition(": ")[0] for line in sets.ACCEPTED.splitlines()]
    for kind, options in spec.OPTIONS.items():
        name = {"npz": "FILE.npz", "folder": "FOLDER", "latents": "LATENTS"}.get(kind, kind)
        assert all(any(part in form for form in forms) for part in (name, *(f",{option}" for option in options)))


def test_data_made_in_python_are_the_same_images_as_uint8_and_as_floats():
    images, labels = torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8), np.array([0, 2, 1, 0, 0, 1])
    found, again = sets.Data.of(images, torch.tensor(labels).int()), sets.Data.of(from_uint8(images).numpy(), labels)
    assert torch.equal(found.images, images) and torch.equal(again.images, images)
    assert found.classes == 3 and torch.equal(found.labels, again.labels) and found.labels.dtype == torch.int64
    assert found.name == again.name == f"6 images, sha256 {fingerprint(images)[:8]}"
    assert sets.Data.of(images, name="mine").name == "mine" and sets.Data.of(images).labels is None


def test_data_made_in_python_of_a_wrong_shape_type_or_range_are_refused_in_one_line():
    right = torch.zeros(4, 1, 8, 8)
    for images, labels, message in (
        (right[:, 0], None, "images are torch.float32 (4, 8, 8); accepted are [N, C, H, W]"),
        (right[:0], None, "images are torch.float32 (0, 1, 8, 8)"),
        (right.long(), None, "images are torch.int64"),
        (right + 255, None, "values from 255 to 255; accepted are [N, C, H, W] as uint8, or as floats in [-1, 1]"),
        (right * torch.nan, None, "values from nan to nan"),
        (right, torch.arange(3), "labels are torch.int64 (3,); accepted are integers [4]"),
        (right, torch.zeros(4), "labels are torch.float32 (4,)"),
        (right, torch.arange(4) - 1, "label -1; accepted are 0 and more"),
    ):
        refuses(message, sets.Data.of, images, labels)


def test_torchvisions_sets_are_read_from_their_root_and_downloaded_only_on_request(tmp_path):
    refuses(f"mnist:{tmp_path},download fetches it", sets.load, f"mnist:{tmp_path}")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 6), ("t10k", 2)):
        pixels = np.arange(n * 784, dtype=np.uint8).reshape(n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + bytes(range(n)))
    found = sets.load(f"mnist:{tmp_path}")
    assert found.images.shape == (6, 1, 28, 28) and found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.images[1, 0, 0, 0] == 784 % 256


def test_a_batch_is_the_images_that_the_seed_draws_and_processes_share_its_rows():
    found = sets.load("digits")
    x0, cond = some(1, found, step=7)[0]
    index = torch.randint(len(found.images), (12,), generator=torch.Generator().manual_seed(seed_of(0, "p", 7, "data")))
    assert torch.equal(x0, found.images[index].float() / 127.5 - 1) and torch.equal(cond["labels"], found.labels[index])
    assert torch.equal(torch.cat([some(1, found, BatchSplit(12, 3, rank), 7)[0][0] for rank in range(3)]), x0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_are_read_as_written_and_batches_are_those_of_the_same_images_in_memory(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    save(tmp_path / "set.npz", images=images, labels=np.arange(40) % 4, captions=np.array([f"image {i}" for i in range(40)]))
    found = sets.load(str(tmp_path / "set.npz"))
    assert found.shape == (3, 6, 5) and found.classes == 4 and found.captions[39] == "image 39"
    assert (found.images.permute(0, 2, 3, 1).numpy() == images).all()
    held = replace(found, images=found.images.contiguous().clone())
    x0, same = some(1, found)[0][0], some(1, held)[0][0]
    assert torch.equal(x0, same) and x0.stride() == same.stride()


def test_stored_npz_images_stay_in_the_file_and_writing_to_them_does_not_change_it(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, labels=np.arange(5), images=np.full((5, 4, 4, 3), 77, np.uint8))
    found = sets.load(str(path))
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
    found = sets.load(str(tmp_path / "set.npz"))
    some(2, found, BatchSplit(128))
    began = time.perf_counter()
    some(40, found, BatchSplit(128))
    assert 40 * 128 / (time.perf_counter() - began) > 5000


def test_flip_mirrors_about_half_of_the_training_images_and_nothing_else():
    plain, flipped = sets.load("digits"), sets.load("digits,flip")
    (x, cond), (y, other) = some(1, plain, BatchSplit(400))[0], some(1, flipped, BatchSplit(400))[0]
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) | mirrored).all() and 150 < mirrored.sum() < 250
    assert torch.equal(cond["labels"], other["labels"]) and torch.equal(plain.images, flipped.images)
    assert torch.equal(torch.cat([some(1, flipped, BatchSplit(400, 2, rank))[0][0] for rank in range(2)]), y)


def test_worker_processes_decode_to_the_bits_of_threads(tmp_path, monkeypatch):
    write(tmp_path / "set", 12, (16, 16, 3))
    threads = sets.load(f"{tmp_path / 'set'},size=7")
    started, pool = [], decode.ProcessPoolExecutor
    monkeypatch.setattr(decode, "PROCESSES_FROM", 2)
    monkeypatch.setattr("eval.machine.cores", lambda: 2)
    monkeypatch.setattr(decode, "ProcessPoolExecutor", lambda n, *a: started.append(n) or pool(n, *a))
    assert torch.equal(sets.load(f"{tmp_path / 'set'},size=7").images, threads.images) and started == [2]


def test_braces_are_expanded():
    assert webdataset.expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert webdataset.expand("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]


def test_shards_give_images_with_classes_and_captions_from_any_of_their_files(tmp_path):
    pack(tmp_path / "a-0.tar", {"k/0.png": png(0), "k/0.cls": b"2", "k/0.txt": b"a cat\n", "k/0.other": b"?"})
    described = json.dumps({"label": 1, "caption": "a dog"}).encode()
    pack(tmp_path / "a-1.tar", {"1.json": described, "1.jpg": png(1), "2.txt": b"no"})
    for pattern in ("a-{0..1}.tar", "a-*.tar", "a-{0,1}.tar,size=4"):
        found = sets.load(f"wds:{tmp_path / pattern}")
        assert found.labels.tolist() == [2, 1] and found.captions == ["a cat", "a dog"] and found.classes == 3
        assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert found.shape == (1, 4, 4)


def test_shards_that_are_missing_or_damaged_or_have_a_wrong_label_are_refused_with_their_path(tmp_path):
    pack(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"two"})
    (tmp_path / "torn.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    for name, message in (
        ("a.tar", "a.tar/0: ... accepted are .cls with a number"),
        ("b-{1..2}.tar", "b-1.tar: there is no such file; accepted is"),
        ("b-*.tar", "no file matches"),
        ("torn.tar", "torn.tar: not a whole tar file"),
    ):
        refuses(message, sets.load, f"wds:{tmp_path / name}")


@pytest.fixture
def streamed(tmp_path):
    """The flat images 0..23 in four shards, labelled by their parity, through a buffer of 8."""
    for k in range(4):
        shard(tmp_path / f"s-{k}.tar", range(6 * k, 6 * k + 6), png=png, cls=lambda i: b"%d" % (i % 2))
    return sets.load(f"wds:{tmp_path}/s-{{0..3}}.tar,stream=8,classes=2")


def test_a_stream_shows_every_image_once_per_pass_shuffled_and_with_its_own_label(streamed):
    assert streamed.images[:, 0, 0, 0].tolist() == list(range(8)) and streamed.classes == 2
    batches = some(8, streamed, BatchSplit(6))
    order = seen(batches)
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and order[:24] != sorted(order[:24]) != order[24:]
    assert labels_of(batches) == [i % 2 for i in order]
    assert [i for _, images, _, _ in streamed.walk(5) for i in images[:, 0, 0, 0].tolist()] == list(range(24))


def test_processes_stream_parts_that_do_not_overlap(streamed):
    parts = [seen(some(4, streamed, BatchSplit(6, 2, rank))) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(24))
    refuses("fewer shards than the 5 processes", some, 1, streamed, BatchSplit(5, 5, 4))


def test_a_stream_continues_from_a_step_with_the_same_bits(streamed):
    whole = some(8, streamed, BatchSplit(6, microbatch=3))
    for (x, cond), (y, other) in zip(whole[6:], some(2, streamed, BatchSplit(6, microbatch=3), step=3), strict=True):
        assert torch.equal(x, y) and torch.equal(cond["labels"], other["labels"])


def test_captions_become_labels_by_their_position_among_the_prompts_with_and_without_a_stream(tmp_path):
    prompts = ["zero", "one", "two"]
    shard(tmp_path / "s.tar", range(9), png=png, txt=lambda i: prompts[i % 3].encode())
    for options in ("", ",stream=3"):
        found = sets.load(f"wds:{tmp_path}/s.tar{options}").captioned(["nothing", *prompts])
        batches = some(4, found, BatchSplit(6))
        assert labels_of(batches) == [1 + i % 3 for i in seen(batches)] and found.classes == 4
    found = sets.load(f"wds:{tmp_path}/s.tar,stream=2").captioned(prompts[:2])
    refuses("s.tar/2: the caption 'two' is none of the teacher's 2 prompts", some, 2, found, BatchSplit(6))


def test_in_a_stream_another_image_replaces_a_corrupt_one_and_more_than_1_percent_are_fatal(tmp_path, capsys):
    shard(tmp_path / "s.tar", range(500), png=lambda i: b"no image" if i in (3, 300, 301) else png(i % 250))
    found = sets.load(f"wds:{tmp_path}/s.tar,stream=100")
    whole = some(10, found, BatchSplit(50))
    assert "s.tar/300 cannot be read and is left out" in capsys.readouterr().err
    assert all(len(x0) == 50 for x0, _ in whole) and torch.equal(whole[7][0], some(1, found, BatchSplit(50), step=7)[0][0])
    shard(tmp_path / "s.tar", range(500), png=lambda i: b"no image" if 200 < i < 220 else png(i % 250))
    refuses(" of 1000 images cannot be read, the first is ... s.tar/2", some, 20, found, BatchSplit(50))


def test_a_labelled_stream_needs_the_number_of_classes(tmp_path, streamed):
    shards = f"wds:{tmp_path}/s-{{0..3}}.tar"
    refuses("add classes=N", sets.load, f"{shards},stream=8")
    refuses("label 1; accepted are 0 to 0, classes=N sets their number", sets.load, f"{shards},classes=1")


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_streams_its_images_in_parts_that_do_not_overlap(tmp_path, prefix):
    if prefix:
        pytest.importorskip("datasets")
    for i in range(8):
        (tmp_path / "set" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / str(i % 2) / f"{i}.png").write_bytes(png(i))
    found = sets.load(f"{prefix}{tmp_path / 'set'},stream=4")
    parts = [some(2, found, BatchSplit(4, 2, rank)) for rank in range(2)]
    assert sorted(seen(parts[0] + parts[1])) == list(range(8)) and found.classes == 2
    assert [labels_of(part) for part in parts] == [[i % 2 for i in seen(part)] for part in parts]


def test_a_saved_set_of_the_datasets_package_is_read_offline_with_its_classes_and_captions(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=["a", "b", "c"]),
        "text": datasets.Value("string"),
    }
    rows = {"img": [Image.open(io.BytesIO(png(i))) for i in range(5)], "fine_label": [0, 1, 0, 1, 1], "text": list("vwxyz")}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(str(tmp_path / "saved"))
    found = sets.load(f"hf:{tmp_path / 'saved'}")
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and found.labels.tolist() == [0, 1, 0, 1, 1]
    assert found.classes == 3 and found.captions == list("vwxyz")
    assert sets.load(f"hf:{tmp_path / 'saved'},split=test,image=img,label=fine_label,size=3").images[0, 0, 0, 0] == 3
    stream = sets.load(f"hf:{tmp_path / 'saved'},stream=3")
    assert sorted(seen(some(1, stream, BatchSplit(5)))) == [0, 1, 2, 3, 4]
    for option, message in (
        ("image=pixels", "no column 'pixels'; accepted as image=... are img, fine_label, text"),
        ("image=text", "column 'text' holds Value, not images"),
        ("label=text", "text is 'v'; accepted as label=... is a column of class numbers"),
        ("split=validation", "KeyError: 'validation'"),
    ):
        refuses(message, sets.load, f"hf:{tmp_path / 'saved'},{option}")


def test_without_the_datasets_package_or_a_network_one_line_explains_it(monkeypatch):
    pytest.importorskip("datasets")
    refuses("hf:nobody/nothing, split=train: ... is there a network", sets.load, "hf:nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("needs the package datasets: pip install -e '.[hf]'", sets.load, "hf:cifar10")


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
    """A latent model of 8x8 digits, which `teachers.load` returns for every spec."""
    model = replace(untrained((1, 4, 4), 10, (8, 16), 1, 0), codec=Codec(Halves(), 0.5, 0.1))
    monkeypatch.setattr(teachers, "load", lambda spec, **_: model)
    return model


def encode(folder, *arguments):
    here(latents.main, "--model latent --output-dir", folder, *arguments)


def test_latents_of_a_set_are_those_of_its_codec_and_batches_take_them_unchanged(latent, tmp_path):
    encode(tmp_path / "l", "--dtype float32 --shard-images 1000")
    index = json.loads((tmp_path / "l" / "index.json").read_text())
    assert (index["count"], index["scale"], index["shift"], len(index["shards"])) == (1797, 0.5, 0.1, 2)
    digits, found = sets.load("digits"), sets.load(str(tmp_path / "l"))
    assert torch.allclose(found.images, (nn.functional.avg_pool2d(digits.x0(slice(None)), 2) - 0.1) * 0.5, atol=1e-6)
    assert torch.equal(found.labels, digits.labels) and found.shape == (1, 4, 4)
    (x0, cond), (pixels, _) = some(1, found)[0], some(1, digits)[0]
    assert torch.allclose(latent.decode(x0), nn.functional.interpolate(nn.functional.avg_pool2d(pixels, 2), scale_factor=2))
    assert x0.dtype == torch.float32 and len(cond["labels"]) == 12


def test_latents_need_a_model_with_an_autoencoder_images_and_a_new_folder(latent, tmp_path, refused, monkeypatch):
    encode(tmp_path / "l", "--preset smoke")
    for codec, folder, more, message in (
        (latent.codec, "l", "", "exists already; choose another --output-dir"),
        (latent.codec, "m", f"--data {tmp_path / 'l'}", "holds latents already; accepted are images"),
        (latent.codec, "m", "--batch-size 0", "--batch-size 0: accepted are whole numbers, at least 1"),
        (None, "m", "", "a pixel-space model without autoencoder"),
    ):
        monkeypatch.setattr(teachers, "load", lambda spec, codec=codec: replace(latent, codec=codec))
        assert message in refused(latents.main, "--model latent --output-dir", tmp_path / folder, more)
    assert "required: --model" in refused(latents.main, "--output-dir", tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


def test_captions_go_with_latents_and_a_changed_shard_is_refused(latent, tmp_path):
    images = np.zeros((70, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(70) % 10, captions=list("ab" * 35))
    encode(tmp_path / "l", "--data", tmp_path / "set.npz", "--preset smoke")
    found = sets.load(str(tmp_path / "l"))
    assert found.captions == list("ab" * 32) and found.images.dtype == torch.float16
    files.save(tmp_path / "l" / "latents-00000.safetensors", {"latents": torch.zeros(3, 1, 4, 4)}, {})
    message = "latents are torch.float32 (3, 1, 4, 4), the index has torch.float16 (64, 1, 4, 4)"
    refuses(message, sets.load, str(tmp_path / "l"))


def test_latents_train_only_models_with_the_autoencoder_that_made_them(latent, tmp_path):
    encode(tmp_path / "l", "--preset smoke")
    found = sets.load(str(tmp_path / "l"))
    checks.check_match(latent, found, training=True)
    for codec, message in (
        (Codec(Halves(), 0.25, 0.1), "latents with scale 0.5, the teacher has 0.25"),
        (Codec(Halves(2.0), 0.5, 0.1), "latents with codec_sha256"),
        (None, "the teacher works on images"),
    ):
        refuses(message, checks.check_match, replace(latent, codec=codec), found)
    checks.check_match(latent, sets.load("digits"))
    refuses("recipes/latents.py makes latents", checks.check_match, latent, sets.load("digits"), True)


def test_measuring_against_latents_needs_a_stored_reference(latent, tmp_path, refused):
    encode(tmp_path / "l", "--preset smoke")
    for recipe in (evaluate, progressive):
        line = refused(recipe.main, "--data", tmp_path / "l", "--output-dir", tmp_path / "out")
        assert "FID cannot be measured against; give a stored --reference" in line and not (tmp_path / "out").exists()


def test_bad_data_end_in_one_line_with_exit_code_2_and_nothing_written(tmp_path, refused):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    for name, arrays in {
        "float": {"images": images.astype(np.float32)}, "short": {"images": images, "labels": np.arange(3)},
        "text": {"images": images, "labels": np.array(list("abcd"))}, "minus": {"images": images, "labels": np.arange(-1, 3)},
        "none": {"pictures": images}, "pickle": {"images": np.array([{}], object)},
    }.items():  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:300])
    (tmp_path / "empty.npz").write_bytes(b"")
    write(tmp_path / "small", 2)
    for name in ("empty", "deep", "index"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep" / "0.png")
    (tmp_path / "index" / "index.json").write_text(json.dumps({"format": "fewstep-latents/1", "count": 3}))
    for text, message in {
        "float.npz": "images are float32", "short.npz": "labels of int64 and shape (3,)", "text.npz": "labels of <U1",
        "minus.npz": "label -1", "none.npz": "images", "pickle.npz": "allow_pickle", "torn.npz": "accepted are images uint8",
        "empty.npz": "accepted are images uint8", "empty": "holds no images", "small,size=64": "0.png: 12x10 is smaller than 64x64",
        "deep": "mode I;16; accepted are 8 bits", "gone": "unknown data", "index": "not a whole index of latents",
    }.items():  # fmt: skip
        assert message in refused(evaluate.main, f"--data {tmp_path / text} --output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
