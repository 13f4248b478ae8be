"""The page in which `dvc plots` shows its charts, with the script that draws them: so no network is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.cli import console
from stages.files import outputs


def plots(
    out: Annotated[Path, typer.Option(help="The page, which .dvc/config names.")] = Path(".dvc/plots.html"),
) -> None:
    """Write the page template for `dvc plots show` and `dvc plots diff`. `make setup` does this."""
    from stages.reporting.vega import dvc_template

    outputs.write_text(out, dvc_template())
    console.say(f"template of dvc plots → {out}")


if __name__ == "__main__":
    console.main(plots)
