"""recipes/latents.py decodes images in pieces: few are in memory, and the shards are those of whole blocks."""

import filecmp
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import here, words
from PIL import Image
from pipelines import ldm, vae, xl
from processes import together
from test_data import pack

from recipes import latents
from recipes.data import decode

COUNT, BATCH, SHARD = 40, 2, 17
SIZES = ((16, 16), (12, 20), (20, 12))
CPU = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A latent pipeline, and images of three shapes in turn."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    ldm(folder, vae()).save_pretrained(folder / "ldm")
    (folder / "set").mkdir()
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        height, width = SIZES[i % 3]
        Image.fromarray(draw.integers(0, 256, (2 * height, 2 * width, 3), dtype=np.uint8)).save(folder / "set" / f"{i:02d}.png")
    return folder


def encoding(made, **options):
    config = latents.Config(model=str(made / "ldm"), shard_images=SHARD, batch_size=BATCH, dtype="float32", **options)
    return config, *latents.load_pair(config)


@pytest.mark.parametrize(
    "options", [{"sizes": ("16x16", "12x20", "20x12")}, {"data": "SET,size=16,stream=3"}], ids=["sizes", "stream"]
)
def test_images_are_read_a_few_batches_before_they_are_encoded(made, options, monkeypatch):
    """At most a piece is decoded, and less than a batch of each size waits."""
    data = options.get("data", "SET").replace("SET", str(made / "set"))
    config, model, data = encoding(made, **options | {"data": data})
    read, encoded, ahead = [], [], []
    encode = type(model.codec).encode

    def counted(codec, images):
        ahead.append(len(read) - sum(encoded))
        encoded.append(len(images))
        return encode(codec, images)

    source = data.source if config.sizes else data.stream.source

    def records(*how):
        for record in source.records(*how):
            read.append(record)
            yield record

    counting = replace(source, records=records)
    data = replace(data, source=counting) if config.sizes else replace(data, stream=replace(data.stream, source=counting))
    monkeypatch.setattr(type(model.codec), "encode", counted)
    for _ in latents.encoded(model, data, config, CPU):
        pass
    waiting = (BATCH - 1) * len(config.sizes or (1,))
    assert sum(encoded) == COUNT and max(ahead) <= latents.DECODED * BATCH + waiting < SHARD
    assert max(encoded) == BATCH


def test_a_shard_holds_the_latents_of_whole_blocks_in_batches(made):
    config, model, data = encoding(made, data=str(made / "set"), sizes=("16x16", "12x20", "20x12"))
    found = {name: tensors["latents"] for name, tensors, _ in latents.encoded(model, data, config, CPU)}
    expected = {}
    for number, kept in decode.decode_blocks(data.source, data.form, SHARD):
        for height, width in SIZES:
            pixels = np.stack([image for _, image in kept if image.shape[1:] == (height, width)])
            batches = (torch.from_numpy(pixels).float() / 127.5 - 1).split(BATCH)
            latent = torch.cat([model.codec.encode(batch) for batch in batches])
            expected[f"{height}x{width}/latents-{number:05d}.safetensors"] = latent
    assert found.keys() == expected.keys() and len(found) == 9
    assert all(torch.equal(found[name], expected[name]) for name in found)


def same(one, two):
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file())
    return filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


@pytest.mark.slow
def test_two_launched_processes_write_the_folders_of_sizes_of_one_to_the_byte(tmp_path):
    xl(tmp_path / "words").save_pretrained(tmp_path / "xl")
    files = {}
    for i in range(24):
        height, width = SIZES[i % 3]
        Image.new("RGB", (2 * width, 2 * height), (10 * i, 5 * i, 255 - 9 * i)).save(tmp_path / "one.png")
        files |= {f"{i:02d}.png": (tmp_path / "one.png").read_bytes(), f"{i:02d}.txt": f"image {i % 7}".encode()}
    pack(tmp_path / "set.tar", files)
    data = f"wds:{tmp_path / 'set.tar'}"
    common = ("--model", tmp_path / "xl", "--data", data, "--sizes 16x16 12x20 20x12 --shard-images 5 --batch-size 2")
    here(latents.main, *common, "--shard-captions 2 --output-dir", tmp_path / "one")
    arguments = words(*common, "--shard-captions 2 --threads 1 --output-dir", tmp_path / "two")
    codes, said = together(2, latents.main, arguments, log=tmp_path / "log")
    assert codes == {0} and "24 latents of set" in said, said
    assert same(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "one").rglob("latents-*.safetensors"))) == 15
