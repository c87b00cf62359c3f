"""Read files of prompts."""

from __future__ import annotations

from distill.reading import read_text


def read_prompts(path: str) -> list[str]:
    """Return the lines of a text file that are not empty. Raises ValueError if there are none."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts={path}: not a readable text file ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path}: the file is empty; accepted is one prompt per line")
    return prompts
