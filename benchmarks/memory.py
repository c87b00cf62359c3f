"""Measure the peak memory of training steps in this process: python -m benchmarks.memory NETWORK METHOD

Prints {"peak": bytes that the steps add, "needed": bytes of weights, gradients, Adam, average, teacher and saved activations}.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.networks import NETWORKS, Network
from benchmarks.training import built, steps
from eval.machine import default_device, peak_memory_gb, resident_bytes
from recipes.common.footprint import saved_bytes
from recipes.common.plan import size_of


def activations(network: Network, net: torch.nn.Module, device: torch.device) -> int:
    """Return the bytes that one forward pass saves for its backward pass, beside the weights."""
    x = network.data.x0(slice(network.batch), device)
    labels = None if network.data.labels is None else network.data.labels[: network.batch].to(device)
    cond = network.model.condition(labels)
    return saved_bytes(lambda: net(x, torch.full((len(x),), 500.0, device=device), **cond).square().sum(), net.parameters())


def main(name: str, method_name: str) -> None:
    network, device = NETWORKS[name](), default_device()
    before = resident_bytes(device)
    student, method = built(method_name, network.model.to(device), network.data)
    step = steps(method, student, network, device)
    for _ in range(3):
        step()
    peak = 1e9 * peak_memory_gb(device) - before
    net = student.student().net.to(device)
    # the teacher is in memory before; weights, gradients, two moments of Adam and the average are not
    needed = 5 * size_of(net.parameters()) + activations(network, net, device)
    print(json.dumps({"peak": peak, "needed": needed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
