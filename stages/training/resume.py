"""A training run that can be interrupted: it starts from its last checkpoint, and saves one before it stops.

On several ranks, rank 0 holds the lock and the checkpoints, and all stop after the same update when one is told to.
What the user should know goes to `tell`, a function of one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from stages.model import numerics
from stages.scoring.ranks import Ranks
from stages.training.checkpoint import BusyError, Checkpoints, rounding
from stages.training.loop import Trainer
from stages.training.progress import Event

LOCK_SECONDS = 60  # how long to wait for another process of the same run to leave

Tell = Callable[[str], None]
# The reason to stop and the exit status for it, or None to go on.
StopRequest = tuple[str, int] | None


class StoppedError(Exception):
    """The run was asked to stop, and its state is saved; the exit status is the argument."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run(
    trainer: Trainer,
    checkpoints: Checkpoints,
    *,
    steps_per_save: int,
    requested: Callable[[], StopRequest],
    tell: Tell,
) -> Iterator[Event]:
    """Train from the last checkpoint to the end, an event an update.

    Raises:
        StoppedError: `requested` gave a reason to stop.
        ValueError: a loss is not finite.
    """
    ranks = trainer.ranks
    if ranks.rank == 0:
        _take_up(trainer, checkpoints, tell)
    trainer.synchronise()
    for event in trainer.run():
        yield event
        request = _any_request(requested(), ranks)
        if ranks.rank == 0 and (request or event.step % steps_per_save == 0 or event.validation):
            checkpoints.save(trainer.snapshot())
        if request:
            reason, status = request
            tell(f"stopped by {reason} after step {event.step}; the same command goes on from there")
            ranks.barrier()  # a rank that ends makes the launcher end the others: not before rank 0 has saved
            raise StoppedError(status)


def _take_up(trainer: Trainer, checkpoints: Checkpoints, tell: Tell) -> None:
    snapshot, damaged = checkpoints.latest()
    for name in damaged:
        tell(f"the checkpoint {checkpoints.folder / name} is damaged and passed over")
    if snapshot is not None:
        trainer.restore(snapshot)
        tell(f"going on after step {trainer.progress.step}")
    elif other := checkpoints.elsewhere():
        tell(
            f"beginning anew: a checkpoint of this run was made with {numerics.describe(other)}, here computes "
            f"{numerics.describe(rounding())}; to go on from it, use its machine or its model.numerics"
        )


def _any_request(own: StopRequest, ranks: Ranks) -> StopRequest:
    """This rank's own request to stop, or another's."""
    statuses = ranks.gather([own[1] if own else 0])[:, 0]
    if own or not statuses.any():
        return own
    rank = int(statuses.argmax())
    return f"a request to rank {rank}", int(statuses[rank])


@contextmanager
def lock(checkpoints: Checkpoints, ranks: Ranks, tell: Tell) -> Iterator[None]:
    """Keep other processes out of this run, after waiting for one that is leaving; rank 0 does so for all.

    Raises:
        ValueError: another process goes on training it.
    """
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
                    tell(f"waiting for process {busy}, which trains this very run, to leave")
                    told = True
                time.sleep(0.5)
        yield
