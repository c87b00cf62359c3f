"""Captions of the embedded digits: every image has one, and ten classes of several wordings make a list of prompts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.rng import seed_of

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {word}",
    "a photo of {a} {digit}",
    "the digit {word}",
    "{a} {digit} in grey on black",
    "number {word} written by hand",
    "an image of the digit {digit}",
    "handwriting of {a} {word}",
    "{word}",
)


def prompts() -> list[str]:
    """Return all captions: the wordings of class 0, then those of class 1, and so on."""
    return [
        wording.format(a="an" if digit == 8 else "a", word=word, digit=digit)
        for digit, word in enumerate(WORDS)
        for wording in WORDINGS
    ]


def class_of(prompt: Any) -> Any:
    """Return the digit of a prompt, by its place in `prompts`: an integer, or a tensor of them."""
    return prompt // len(WORDINGS)


def captioned(labels: Tensor) -> list[int]:
    """Return the place in `prompts` of each image's caption, for images in their order with these labels [N].

    The wording is a function of the image's number: the same image has the same caption everywhere.
    """
    return [int(label) * len(WORDINGS) + seed_of("caption", i) % len(WORDINGS) for i, label in enumerate(labels)]
