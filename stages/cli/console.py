"""Output for the user: progress, tables, warnings, and errors as one line and an exit status."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from stages.cli.versions import describe_difference
from stages.params.loading import PARAMS_FILE, ParamsError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameters.", rich_help_panel="Parameters")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a parameter; may be repeated.",
        rich_help_panel="Parameters",
    ),
]
# `--base` is its older name; where a model is asked, it is a flag: the base model alone.
ManifestFile = Annotated[Path, typer.Option("--manifest", "--base", help="The base model's manifest.")]
DEFAULT_PARAMS = PARAMS_FILE

RANK_0_SECONDS = 2  # for which another rank waits, so that rank 0 prints the error
_rank = 0


def follow(rank: int) -> None:
    """Print nothing from now on unless `rank` is 0; an error of this rank alone is still printed."""
    global _rank
    _rank = rank
    out.quiet = err.quiet = rank > 0


def main(command: Callable[..., Any]) -> None:
    """Run one stage command from the command line: `python -m stages.NAME`."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command()(command)
    run(app)


def run(app: typer.Typer) -> None:
    """Run a Typer app. An expected failure becomes one line on stderr for each thing wrong, and exit status 1."""
    app.pretty_exceptions_enable = False
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    # DVC will note the versions that the file names: say so if these are not the ones that compute.
    if "DVC_ROOT" in os.environ and (difference := describe_difference()):
        warn(difference)
    try:
        app()
    except (ValueError, OSError) as error:
        if _rank:
            # An error that every rank meets ends rank 0 as well, and the launcher then ends this process.
            time.sleep(RANK_0_SECONDS)
            err.quiet = False
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


def show_error(error: Exception) -> None:
    """Print an expected failure: one line for each thing wrong."""
    who = f"rank {_rank}: " if _rank else ""
    for line in _explain(error).splitlines():
        err.print(f"{who}[bold red]error:[/] {_escape(line)}", soft_wrap=True)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error) or type(error).__name__
    if isinstance(error, ParamsError) and "DVC_ROOT" in os.environ:
        text += "\noutputs that DVC removed before this stage ran come back with: dvc checkout"
    return text


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    # Libraries' own deprecation notices are for their developers.
    if issubclass(category, UserWarning):
        warn(str(message))


def warn(text: str) -> None:
    """Print a warning of one line."""
    err.print(f"[bold yellow]warning:[/] {_escape(text)}", soft_wrap=True)


def note(text: str) -> None:
    """Print one line beside the output, to stderr."""
    err.print(f"[dim]{_escape(text)}[/]", soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None = None, *, unit: str | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on a terminal, nothing elsewhere; with a `unit`, its speed too.

    Yields the function that moves it, `advance(amount=1, to=None, status="")`.
    """
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total is not None and total < 1e6 else TextColumn("{task.percentage:>3.0f}%"),
        *([_Speed(unit)] if unit else []),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    ]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=total, status="")

        def advance(amount: float = 1, *, to: float | None = None, status: str = "") -> None:
            bar.update(task, completed=to, advance=amount if to is None else None, status=status)

        yield advance


class _Speed(ProgressColumn):
    """A progress bar's column for the speed: `1,234 rows/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} {self._unit}/s")


def say(text: str) -> None:
    """Print one line."""
    out.print(_escape(text), soft_wrap=True)


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[Any]], *, numeric: bool = True) -> None:
    """Print a table: the first column holds names, the others figures, or text if not `numeric`."""
    grid = Table()
    for index, name in enumerate(header):
        grid.add_column(name, justify="right" if numeric and index else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*(figure(cell) for cell in row))
    # Not as the table's own title, which would wrap at the table's width.
    out.print(f"[bold]{_escape(title)}[/]", soft_wrap=True)
    out.print(grid)


def figure(value: Any) -> str:
    """Format a table cell: whole numbers with thousands separated, others with four decimals, text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _escape(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
