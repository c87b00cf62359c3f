"""Batches that one background thread prepares while the GPU works on those before.

The thread uses the CPU alone: it fills pinned buffers that the consumer made. No call of the driver therefore comes from it, which
would need the right device, and the copies to the GPU keep the consumer's order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor | None]  # images and labels
DEPTH = 3  # batches in memory beside the one in use
THREAD = "batches ahead"
PATIENCE = 5.0  # seconds for which an end waits for the thread; one that waits for a disk ends later, with its batch


def ahead(batches: Generator[Batch, None, None], depth: int = DEPTH, room: int | None = None) -> Generator[Batch, None, None]:
    """Yield what ``batches`` yields, in pinned memory where there is a GPU, prepared up to ``depth`` batches ahead by a thread.

    All batches have the number of samples and the types of the first. ``room``: the numbers of the largest sample; default is the
    first batch's, whose shape all others then have. An exception of ``batches`` is raised here, after the batches before it. The thread
    ends when this iterator is closed, garbage or interrupted. Raises RuntimeError in a process that was forked meanwhile.
    """
    first = next(batches, None)
    if first is None:
        return
    spare: SimpleQueue[Batch] = SimpleQueue()  # buffers to fill
    ready: SimpleQueue[Batch | BaseException | None] = SimpleQueue()  # None: the end
    closed, owner = threading.Event(), os.getpid()

    def work() -> None:
        end: BaseException | None = None
        try:
            while not closed.is_set() and (batch := next(batches, None)) is not None:
                buffers = spare.get()
                if not closed.is_set():
                    ready.put(_filled(buffers, batch))
        except BaseException as error:  # raised by the consumer
            end = error
        finally:
            batches.close()
            ready.put(end)

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    thread.start()
    try:
        for _ in range(depth - 1):  # and one that waits for a buffer
            spare.put(_buffers(first, room))
        yield _filled(_buffers(first, room), first)
        while True:
            if os.getpid() != owner:
                raise RuntimeError(
                    "batches are prepared by a thread, which a forked process does not have: make them anew there"
                )
            batch = ready.get()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            spare.put(_buffers(first, room))
            yield batch
    finally:
        closed.set()
        spare.put(_buffers(first, room))  # ends a wait for one
        if os.getpid() == owner and threading.current_thread() is not thread:
            thread.join(PATIENCE)


def _buffers(like: Batch, room: int | None) -> Batch:
    """Return flat memory for the images of a batch with samples of up to ``room`` numbers, and for its labels."""
    pinned: dict[str, Any] = {"pin_memory": True} if torch.cuda.is_available() else {}
    images, labels = like
    flat = torch.empty(images.numel() if room is None else room * len(images), dtype=images.dtype, **pinned)
    return flat, None if labels is None else torch.empty(labels.shape, dtype=labels.dtype, **pinned)


def _filled(buffers: Batch, batch: Batch) -> Batch:
    (images, labels), (some, theirs) = buffers, batch
    return images[: some.numel()].view(some.shape).copy_(some), None if labels is None or theirs is None else labels.copy_(
        theirs
    )
