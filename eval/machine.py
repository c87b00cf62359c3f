"""What the machine offers: device, clock, memory, cores."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")  # of Linux
CPU_INFO = Path("/proc/cpuinfo")


def default_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """Return the name of the CPU where Linux tells it, else its architecture."""
    with contextlib.suppress(OSError, StopIteration):
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{platform.machine()} CPU"


def commit() -> str | None:
    """Return what ``git describe`` says of the checkout that this package lies in; None where it is none, or without git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    return None


def clock(device: torch.device) -> float:
    """Return the time in seconds after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_gb(device: torch.device) -> float:
    """Return this process's peak memory in GB: allocated GPU memory on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if STATUS.exists():  # getrusage would also count the process that this one was forked from
        return int(STATUS.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_bytes(device: torch.device) -> int:
    """Return the memory that this process holds now: allocated GPU memory on CUDA, else resident memory, or its peak outside of Linux."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if STATUS.exists():
        return int(STATUS.read_text(encoding="ascii").partition("VmRSS:")[2].split()[0]) * 1024
    return int(1e9 * peak_memory_gb(device))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` count from now on, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory() -> int:
    """Return the bytes of memory of this machine, or of this process where a limit is set for it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return here if limit == resource.RLIM_INFINITY else min(here, limit)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
