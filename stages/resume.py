"""A training run that survives: taken up from its checkpoint, saved as it goes, left in order when told to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from stages import console, interrupts

if TYPE_CHECKING:
    from stages.lora.checkpoint import Checkpoints
    from stages.lora.loop import Event, Trainer

LOCK_SECONDS = 60  # how long to wait for another process of the same run to leave


def checkpoint_root() -> Path:
    """Outside DVC's outs, and in the project's own folder even for an experiment that runs in a folder of its own."""
    return Path(os.environ.get("DVC_ROOT", ".")) / "artifacts" / "checkpoints"


def run(trainer: Trainer, checkpoints: Checkpoints, *, steps_per_save: int, report: Callable[[Event], None]) -> None:
    """Train from the last checkpoint to the end, reporting each event.

    Raises:
        typer.Exit: asked to stop; the state is saved.
        ValueError: a loss is not finite.
    """
    with interrupts.stop_requests() as stop:
        snapshot, damaged = checkpoints.latest()
        for name in damaged:
            console.warn(f"the checkpoint {checkpoints.folder / name} is damaged and passed over")
        if snapshot is not None:
            trainer.restore(snapshot)
            console.say(f"going on after step {trainer.progress.step}")
        for event in trainer.run():
            report(event)
            request = stop()
            if request or event.step % steps_per_save == 0 or event.validation:
                checkpoints.save(trainer.snapshot())
            if request:
                console.say(f"stopped by {request[0]} after step {event.step}; the same command goes on from there")
                raise typer.Exit(request[1])


@contextmanager
def lock(checkpoints: Checkpoints) -> Iterator[None]:
    """Keep other processes out of this run, after waiting for one that is leaving.

    Raises:
        ValueError: another process goes on training it.
    """
    from stages.lora.checkpoint import BusyError

    deadline, told = time.monotonic() + LOCK_SECONDS, False
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(checkpoints.locked())
                break
            except BusyError as busy:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"process {busy} trains this very run already: let it finish, or stop it: kill {busy}"
                    ) from None
                if not told:
                    console.say(f"waiting for process {busy}, which trains this very run, to leave")
                    told = True
                time.sleep(0.5)
        yield
