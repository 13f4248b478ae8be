"""A training run that survives: taken up from its checkpoint, saved as it goes, left in order when told to stop.

On several ranks, rank 0 holds the lock and the checkpoints, and all stop after the same update when one is told to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from stages.cli import console, interrupts

if TYPE_CHECKING:
    from stages.scoring.ranks import Ranks
    from stages.training.checkpoint import Checkpoints
    from stages.training.loop import Trainer
    from stages.training.progress import Event

LOCK_SECONDS = 60  # how long to wait for another process of the same run to leave


def run(trainer: Trainer, checkpoints: Checkpoints, *, steps_per_save: int, report: Callable[[Event], None]) -> None:
    """Train from the last checkpoint to the end, reporting each event.

    Raises:
        typer.Exit: asked to stop; the state is saved.
        ValueError: a loss is not finite.
    """
    ranks = trainer.ranks
    with interrupts.stop_requests() as stop:
        if ranks.rank == 0:
            _take_up(trainer, checkpoints)
        trainer.meet()
        for event in trainer.run():
            report(event)
            request = _request(stop(), ranks)
            if ranks.rank == 0 and (request or event.step % steps_per_save == 0 or event.validation):
                checkpoints.save(trainer.snapshot())
            if request:
                console.say(f"stopped by {request[0]} after step {event.step}; the same command goes on from there")
                ranks.meet()  # a rank that ends makes the launcher end the others: not before rank 0 has saved
                raise typer.Exit(request[1])


def _take_up(trainer: Trainer, checkpoints: Checkpoints) -> None:
    snapshot, damaged = checkpoints.latest()
    for name in damaged:
        console.warn(f"the checkpoint {checkpoints.folder / name} is damaged and passed over")
    if snapshot is not None:
        trainer.restore(snapshot)
        console.say(f"going on after step {trainer.progress.step}")


def _request(own: tuple[str, int] | None, ranks: Ranks) -> tuple[str, int] | None:
    """Why to stop, and the exit status for it: this rank's own reason, or another's."""
    statuses = ranks.gather([own[1] if own else 0])[:, 0]
    if own or not statuses.any():
        return own
    rank = int(statuses.argmax())
    return f"a request to rank {rank}", int(statuses[rank])


@contextmanager
def lock(checkpoints: Checkpoints, ranks: Ranks) -> Iterator[None]:
    """Keep other processes out of this run, after waiting for one that is leaving; rank 0 does so for all.

    Raises:
        ValueError: another process goes on training it.
    """
    from stages.training.checkpoint import BusyError

    if ranks.rank:
        yield
        return
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
