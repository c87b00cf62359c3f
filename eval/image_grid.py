"""Images as PNG files: one picture of many images, or one file per image. Needs Pillow only, so that sampling starts fast."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.files import replacing

GAP = 3


def sample_grid(rows: list[tuple[str, Tensor]], path: Path, columns: int = 12, header: Sequence[str] = ()) -> None:
    """Write rows of uint8 images [n, C, H, W] as one PNG, each row with its label. Empty labels leave no margin.

    ``header``: the labels of the columns, written upwards.
    """
    scale = max(1, 40 // rows[0][1].shape[2])
    tile = _enlarged(rows[0][1][0], scale)
    columns = min(columns, max(len(images) for _, images in rows))
    font = ImageFont.load_default()
    widest = max(font.getlength(label) for label, _ in rows)
    left = round(widest) + 12 if widest else GAP
    above = round(max((font.getlength(label) for label in header), default=0)) + (12 if header else GAP)
    canvas = Image.new("RGB", (left + columns * (tile.width + GAP), above + len(rows) * (tile.height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (label, images) in enumerate(rows):
        top = above + y * (tile.height + GAP)
        draw.text((4, top + tile.height // 2 - 6), label, fill="black", font=font)
        for x, pixels in enumerate(images[:columns]):
            canvas.paste(_enlarged(pixels, scale), (left + x * (tile.width + GAP), top))
    for x, label in enumerate(header):
        upright = Image.new("RGB", (above, 14), "white")
        ImageDraw.Draw(upright).text((4, 0), label, fill="black", font=font)
        canvas.paste(upright.rotate(90, expand=True), (left + x * (tile.width + GAP) + tile.width // 2 - 7, 0))
    with replacing(path) as aside:
        canvas.save(aside, format="PNG")


def strip(images: Tensor, count: int, side: int = 96) -> bytes:
    """Return the first uint8 images [n, C, H, W] side by side as a PNG, each with a transparent gap, and at most ``side`` pixels high."""
    tiles = [Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for pixels in images[:count]]
    if tiles[0].height > side:
        size = (max(1, round(tiles[0].width * side / tiles[0].height)), side)
        tiles = [tile.resize(size, Image.Resampling.LANCZOS) for tile in tiles]
    step = tiles[0].width + max(1, tiles[0].width // 16)
    canvas = Image.new("RGBA", (count * step, tiles[0].height))
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i * step, 0))
    out = io.BytesIO()
    canvas.save(out, format="PNG", optimize=True)
    return out.getvalue()


def contact_sheet(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write uint8 images [n, C, H, W] as one PNG, row by row."""
    sample_grid([("", part) for part in images.split(columns)], path, columns)


def write_folder(images: Tensor, folder: Path, first: int = 0) -> None:
    """Write uint8 images [n, C, H, W] as 000000.png, 000001.png, ..., numbered from ``first``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images, first):
        Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i:06d}.png")


def _enlarged(pixels: Tensor, scale: int):
    """Return one uint8 image [C, H, W] as a PIL image, ``scale`` times as large."""
    image = Image.fromarray(pixels.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
