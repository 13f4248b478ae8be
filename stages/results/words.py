"""Differences in words."""

from __future__ import annotations

from stages.results.intervals import Estimate


def signed(estimate: Estimate, digits: int = 3) -> str:
    """A difference with its interval: `−0.234 [−0.270, −0.200]`."""
    form = f"+.{digits}f"
    if estimate.low is None or estimate.high is None:
        return _minus(format(estimate.value, form))
    return _minus(f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]")


def change(value: float, digits: int = 3) -> str:
    """A difference: `−0.234`."""
    return _minus(f"{value:+,.{digits}f}")


def number(value: float, digits: int = 3) -> str:
    """A number: `1.683`."""
    return _minus(f"{value:,.{digits}f}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def sentence(difference: Estimate, *, better: int, worse: int, rows: int, name: str = "loss") -> str:
    """A difference in loss as a plain sentence: `better on 22 of 24 rows; loss −0.234 [−0.270, −0.200]`."""
    loss = f"{name} {signed(difference)}"
    if difference.is_noise:
        return f"within noise: better on {better:,} of {rows:,} rows; {loss}"
    if difference.value < 0:
        return f"better on {better:,} of {rows:,} rows; {loss}"
    return f"worse on {worse:,} of {rows:,} rows; {loss}"


def rows_needed(needed: int | None, units: int, unit: str) -> str | None:
    """What a difference half as large would take, if that is more than there are; None if not."""
    if needed is None or needed <= units:
        return None
    name = "rows" if unit == "row" else f"groups ({unit})"
    return f"a difference half as large would take about {needed:,} {name} like these to be seen; there are {units:,}"
