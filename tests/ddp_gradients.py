"""Run by torchrun: every method's gradient from two processes equals that of one with the doubled batch. Exits 0 if so."""

import copy
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from test_consistency import LEARNED, Small

from distill.denoiser import Denoiser
from distill.regularize import Regularized
from distill.rng import Rng
from distill.schedule import Cosine


def gradient(method, student, x0, rows):
    rng = Rng(torch.Generator().manual_seed(7), 32, rows)
    return method(student, x0[rows] if rows else x0, rng=rng, progress=0.6).mean()


def main():
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == 2
    x0 = torch.randn(32, 2, generator=torch.Generator().manual_seed(1)).double()
    wrong = []
    methods = {name: method for name, (method, _) in LEARNED.items()}
    methods["regularized"] = Regularized(methods["cd"], (("martingale", 0.1), ("fokker-planck", 0.01)))
    for name, method in methods.items():
        alone = Denoiser(Small().double(), Cosine())
        shared = replace(alone, net=accelerator.prepare(copy.deepcopy(alone.net)))
        assert type(shared.net).__name__ == "DistributedDataParallel"
        gradient(method, alone, x0, None).backward()
        accelerator.backward(gradient(method, shared, x0, slice(16 * rank, 16 * rank + 16)))
        pairs = zip(alone.net.parameters(), shared.net.parameters(), strict=True)
        worst = max((a.grad - b.grad).abs().max().item() / max(1.0, a.grad.abs().max().item()) for a, b in pairs)
        if not worst < 1e-6:
            wrong.append((name, worst))
    print(wrong or "equal")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
