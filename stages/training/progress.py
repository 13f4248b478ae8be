"""The progress of a run: sums, reports and validations so far, as plain values that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any

import mlx.core as mx

from stages.scoring.ranks import Ranks


@dataclass
class Sums:
    """Sums over some updates."""

    updates: int = 0
    rows: int = 0
    loss_sum: float = 0.0  # nats, before each update
    trained_tokens: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    grad_norm_sum: float = 0.0

    def add(self, other: Sums) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def over(self, ranks: Ranks) -> Sums:
        """One update's sums over all its ranks."""
        totals = zip(astuple(self), ranks.sum(astuple(self)), strict=True)
        return replace(Sums(*(type(own)(total) for own, total in totals)), updates=self.updates)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.trained_tokens

    @property
    def padded_share(self) -> float:
        return self.padded_tokens / (self.real_tokens + self.padded_tokens)


@dataclass(frozen=True)
class Report:
    """The updates since the last report: loss over all their trained tokens, mean gradient norm before clipping."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class Validation:
    """The validation loss after update number `step`; 0 is before the first."""

    step: int
    loss: float


@dataclass
class Progress:
    """The state of a run but for its arrays: plain values, for a checkpoint."""

    step: int = 0
    stopped_early: bool = False
    total: Sums = field(default_factory=Sums)
    since_report: Sums = field(default_factory=Sums)
    reports: list[Report] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, the earliest of equals, not counting the one before the first update."""
        return min((v for v in self.validations if v.step > 0), key=lambda v: v.loss, default=None)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Progress:
        """Undo `dataclasses.asdict`."""
        return cls(
            step=content["step"],
            stopped_early=content["stopped_early"],
            total=Sums(**content["total"]),
            since_report=Sums(**content["since_report"]),
            reports=[Report(**report) for report in content["reports"]],
            validations=[Validation(**validation) for validation in content["validations"]],
        )


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on: arrays by name, and the progress as plain values."""

    arrays: dict[str, mx.array]
    progress: dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """The time that an update took; `tokens` are its rows' own, without padding. Epochs are counted from 0."""

    epoch: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Event:
    """An update (`timing`), or step 0 before the first; a report or a validation may have fallen due."""

    step: int
    report: Report | None
    validation: Validation | None
    timing: Timing | None = None
