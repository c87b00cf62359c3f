"""Progress for people: a bar in a terminal, and one line per minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 60.0  # between two lines of a log


class _Lines(tqdm):
    """Print whole lines instead of redrawing one."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def write(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return write

    def close(self) -> None:
        if not self.disable:  # type: ignore[has-type]
            self.disable = True
            self._decr_instances(self)


def progress(iterable: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """Return a tqdm bar. Without a terminal it prints a line per minute instead: title, count, time left.

    ``show``: False for all processes but the main one. ``options``: as of tqdm.
    """
    if not show:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"
    options |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "bar_format": form, "leave": False}
    return _Lines(iterable, **options)


def note(text: str) -> None:
    """Print a line in a log file, and nothing in a terminal, where a bar shows it."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
