"""Train cd on digits for a while, over and over, and say whether memory, open files and speed stay what they were.

python tests/soak.py --minutes 60          exits with 1 where resident memory grows by more than 2 %, or open files do

The first sixth is the warm-up; the rest is compared by its first and its last third.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import mean, median

import torch
from accelerate import Accelerator

import teachers
from distill.consistency import Consistency, Neighbours, truncated_snr
from distill.resume import Resumable
from distill.target import Mix
from distill.train import BatchSplit, Optimization, train
from recipes.data import sets

BATCH, EVERY = 64, 10  # images; steps between two samples


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def samples(minutes: float, steps: int):
    """Train stages of ``steps`` steps, as the recipe does, and yield (seconds, memory, files, images per second of this process)."""
    teacher, data, accelerator = teachers.load("digits"), sets.load("digits"), Accelerator(cpu=True)
    method = Consistency(Mix(teacher.denoiser), Neighbours(lambda _: 4, grid="uniform"), truncated_snr, order=2, substeps=2)
    how = Optimization(steps * BATCH, BATCH, ema_halflife_images=4_000)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for stage in count():
            batches = data.batches(BatchSplit(BATCH), stage, "soak", accelerator.device, teacher.condition)
            resumable, cpu = Resumable(Path(folder) / str(stage)), time.process_time()
            states = train(
                method, teacher.student(), batches, accelerator, how, seed=stage, phase="soak", resumable=resumable,
                save_every_images=how.images // 8,
            )  # fmt: skip
            for state in states:
                if state.step % EVERY == 0:
                    rate = EVERY * BATCH / (time.process_time() - cpu)
                    cpu = time.process_time()
                    yield time.monotonic() - began, resident(), open_files(), rate
                if time.monotonic() - began > 60 * minutes:
                    return
            resumable.clear()
            accelerator.free_memory()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=200, help="steps of a stage")
    options = parser.parse_args()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    found = list(samples(options.minutes, options.steps))
    kept = found[len(found) // 6 :]
    if len(kept) < 6:
        print(f"only {len(found)} samples: use more --minutes")
        return 1
    first, last = kept[: len(kept) // 3], kept[-(len(kept) // 3) :]
    memory = mean(row[1] for row in last) / mean(row[1] for row in first)
    speed = median(row[3] for row in last) / median(row[3] for row in first)
    files = {row[2] for row in kept}
    print(f"{kept[-1][0] / 60:.1f} minutes, {len(found) * EVERY} steps: the last third by the first")
    print(f"  resident memory  {memory:.4f}   of {first[0][1] / 1e6:.0f} MB")
    print(f"  open files       {min(files)} to {max(files)}")
    print(f"  images per second of CPU time {speed:.3f}")
    good = memory < 1.02 and max(row[2] for row in last) <= max(row[2] for row in first)
    print("flat" if good else "NOT flat")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
