"""Requests to stop: a signal, or the death of the DVC or the launcher that started this process.

The first SIGINT, SIGTERM or SIGHUP asks the work to come to a good end; a second one ends the process at once. A stage
under DVC or `mlx.launch` also stops when its parent is gone: killed alone, that leaves its stage running, and the next
run would run into it.

While a call into MLX waits for another rank, Python hears no signal. A thread then ends the process after a second one,
and in a launched process also when nothing came of the first: the launcher sends just one when another rank is gone.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE_SECONDS = 60  # how long a launched process may take to come to its good end
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_requests() -> Iterator[Callable[[], tuple[str, int] | None]]:
    """Catch requests to stop; yields a function that returns the reason and the exit status, or None."""
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
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_if_stuck, args=(read_end,), daemon=True)
    watch.start()
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write_end)
        watch.join()
        os.close(read_end)
        for each in _SIGNALS:
            signal.signal(each, before[each])


def _end_if_stuck(read_end: int) -> None:
    """End the process after a second signal, in a launched process also if it has not ended long after the first.

    `read_end` is the file descriptor from which the signals' numbers are read.
    """
    first = os.read(read_end, 1)
    seconds = LEAVE_SECONDS if "MLX_RANK" in os.environ else None
    # The other end is closed, and so can be read, when the work came to its end.
    if first and (not select.select([read_end], [], [], seconds)[0] or os.read(read_end, 1)):
        os._exit(128 + first[0])
