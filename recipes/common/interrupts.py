"""How a command leaves before its end: signals, lost processes and full disks end in one line that says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from distill.resume import Stopped
from recipes.common.cli import fail
from recipes.common.locks import unlock_all

AGAIN = "run the same command again to go on"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20.0  # seconds that one of several processes has to leave after a signal; torchrun kills it after 30
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by accelerate launch

_received: list[int] = []  # signals
_finishing = [False]  # whether signals wait for the end of a training step


@contextmanager
def interruptible() -> Iterator[None]:
    """End a command in one line on SIGINT and SIGTERM, with exit code 130 or 143. A decorator of ``main``.

    Training first saves its step, and everything else that is finished is on disk already. Likewise ValueError and OSError end with exit
    code 2, and the loss of another process with 1. A process whose launcher dies gets SIGTERM. One of several processes leaves at the
    latest `GRACE` seconds after a signal, also from a collective call that waits for a lost process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can receive signals
        return
    if any(name in os.environ for name in LAUNCHED):
        _prctl_pr_set_pdeathsig(signal.SIGTERM)
    handlers = {number: signal.signal(number, _receive) for number in SIGNALS}
    try:
        try:
            with _deadline():
                yield
        finally:
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)  # a launcher sends several while this process leaves
    except KeyboardInterrupt as stopped:
        number = (_received or [signal.SIGTERM])[0]
        alone = number == signal.SIGTERM and not isinstance(stopped, Stopped)  # the main process may be the lost one
        _leave(f"stopped{f' at {stopped}' if str(stopped) else ''}: {AGAIN}", 128 + number, everywhere=alone)
    except (ValueError, OSError) as error:
        fail(f"{error}; what was finished is kept: {AGAIN}")
    except RuntimeError as error:
        if not _lost_process(error):
            raise
        _leave(f"stopped, because another process of this run has ended: {AGAIN}", 1, everywhere=True)
    finally:
        unlock_all()
        _received.clear()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Let a signal wait for the end of a training step, which `stop_requested` ends. A signal after the last step is raised at the end."""
    _finishing[0] = True
    try:
        yield
    finally:
        _finishing[0] = False
    if _received:
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Return whether a signal has been received. The ``stop`` of `distill.train.train`."""
    return bool(_received)


def _receive(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if not _finishing[0]:
        raise KeyboardInterrupt


def _leave(line: str, code: int, everywhere: bool) -> NoReturn:
    """End with a line of the main process, or of every process."""
    if everywhere or _rank() == 0:
        _say(line)
    raise SystemExit(code) from None


def _say(line: str) -> None:
    print(f"process {_rank()} {line}" if _rank() else line, file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _lost_process(error: RuntimeError) -> bool:
    """Return whether a collective call failed. Gloo, the backend of CPUs, has no exception class of its own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "peer" in str(error))


@contextmanager
def _deadline() -> Iterator[None]:
    """End this process `GRACE` seconds after a signal, if it is one of several and has not left by then.

    A collective call that waits for a lost process never returns to Python, so this is a thread, which a pipe tells of signals.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    threading.Thread(target=_leave_late, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _leave_late(reading: int) -> None:
    while number := os.read(reading, 1):
        if number[0] in SIGNALS:
            time.sleep(GRACE)
            _say(f"stopped {GRACE:.0f} s after a signal, without saving its step: {AGAIN}")
            os._exit(128 + number[0])
    os.close(reading)
