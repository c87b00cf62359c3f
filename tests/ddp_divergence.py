"""Run alone and by torchrun: one sample of one batch is broken. Writes what each process saw, for tests/test_divergence.py."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_divergence import Broken, poisoned
from test_train import student, weights

from distill.resume import Resumable
from distill.train import BatchSplit, Optimization, train


def main(folder: Path):
    accelerator = Accelerator(cpu=True)
    model = student()
    model.net.body[2].p = 0.0  # dropout masks depend on the number of processes
    split = BatchSplit(64, accelerator.num_processes, accelerator.process_index, 16)
    o = Optimization(images=8 * 64, batch_size=64, microbatch=16, lr=0.01)
    states = train(
        Broken(torch.nan), model, poisoned(split, 5, 40), accelerator, o, seed=0, phase="p", resumable=Resumable(folder),
        save_every_images=2 * 64,
    )  # fmt: skip
    seen = [(state.step, state.rollback) for state in states]
    found = {"seen": seen, "weights": weights(model).tolist()}
    (folder / f"{accelerator.num_processes}-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
