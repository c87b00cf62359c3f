"""recipes/latents.py decodes images in pieces: few are in memory, and the shards are those of whole blocks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import ldm, vae

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
