"""Processes that share the imports of one: forked from a server that has them, they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.progressive", "recipes.consistency", "recipes.evaluate", "recipes.latents"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _begin(environment: dict[str, str], log: Path | None, main: Callable, arguments: tuple) -> None:
    os.environ |= environment
    file = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    main(*arguments)


def together(world: int, main: Callable, *arguments: object, log: Path) -> tuple[set[int | None], str]:
    """Call main(*arguments) in processes that are connected as torchrun connects them. Return their exit codes and all output."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    processes = [FORKS.Process(target=_begin, args=(rank, log, main, arguments)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()  # only where it still runs
        process.join()
    return {process.exitcode for process in processes}, log.read_text()


def killed(reached: Callable[[], object], main: Callable, *arguments: object) -> None:
    """Call main(*arguments) in a process and kill it as soon as ``reached`` is true."""
    process = FORKS.Process(target=_begin, args=({}, None, main, arguments))
    process.start()
    while not reached() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
