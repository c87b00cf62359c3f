"""A few ratios, measured again and compared with the stored ones: does a change make a step, a sampler or extraction slower?

    python -m benchmarks.check             compare; exit code 1 where a ratio is worse
    python -m benchmarks.check --store     write benchmarks/stored.json

CPU time of one thread is compared, and no seconds: only ratios to work of the same run. A ratio is worse if it exceeds the stored one by
more than `SLACK` plus the noise floor of the run. A ratio that seems worse is measured once more, with more turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks import evaluation, sampling, training
from benchmarks.networks import digits
from benchmarks.turns import Ratio
from distill import files

STORED = Path(__file__).parent / "stored.json"
METHODS = ("progressive", "cd", "ect", "meanflow")
SLACK = 0.25
TURNS = 7


def measured(turns: int = TURNS, methods: tuple[str, ...] = METHODS) -> Iterator[Ratio]:
    """Yield the ratios of the digits network."""
    network, cpu = digits(), torch.device("cpu")
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield from training.rows("digits", network, methods, turns, time.process_time, cpu, False)
        yield from sampling.rows("digits", network, turns, time.process_time, cpu, (64, 1), ("ddim", "unipc"))
        yield evaluation.extraction("digits", network, turns, time.process_time, cpu)
    torch.set_num_threads(was)


def worse(found: list[Ratio], stored: dict[str, float]) -> list[str]:
    """Return a line for each ratio that is worse than the stored one by more than `SLACK` plus its floor."""
    return [
        f"{row.name}: {row.ratio:.3f}, stored {stored[row.name]:.3f}, accepted <= {most:.3f}"
        for row in found
        if row.name in stored and row.ratio > (most := stored[row.name] * (1 + SLACK + row.floor))
    ]


def compare() -> list[str]:
    """Measure and return what is `worse` than the stored ratios in two measurements, the second with twice the turns."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    first = worse(list(measured()), stored)
    return first and worse(
        list(measured(2 * TURNS)), {line.partition(":")[0]: stored[line.partition(":")[0]] for line in first}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write the ratios of this run as those to compare with")
    if parser.parse_args().store:
        files.write_json(STORED, {row.name: round(row.ratio, 3) for row in measured(3 * TURNS)})
    elif lines := compare():
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
