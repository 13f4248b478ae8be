"""Requests to stop: a signal, or the death of the DVC or the launcher that started this process.

The first SIGINT, SIGTERM or SIGHUP asks the work to come to a good end; a second one ends the process at once. A stage
under DVC or `mlx.launch` also stops when its parent is gone: killed alone, that leaves its stage running, and the next
run would run into it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_requests() -> Iterator[Callable[[], tuple[str, int] | None]]:
    """Yields a function that tells why to stop, and the exit status for it, or None."""
    received: list[signal.Signals] = []
    parent = os.getppid()

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def requested() -> tuple[str, int] | None:
        if received:
            return received[0].name, 128 + received[0]
        starter = "DVC" if "DVC_ROOT" in os.environ else "launcher" if "MLX_RANK" in os.environ else None
        if starter and os.getppid() != parent:
            return f"the end of the {starter} that started it", 1
        return None

    before = {each: signal.getsignal(each) for each in _SIGNALS}
    # What is ignored stays ignored: `nohup` asks for that.
    for each in _SIGNALS:
        if before[each] != signal.SIG_IGN:
            signal.signal(each, note)
    try:
        yield requested
    finally:
        for each in _SIGNALS:
            signal.signal(each, before[each])
