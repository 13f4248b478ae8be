"""All that a run made, on one page that needs no network.

data, artifacts → artifacts/report/index.html: `python -m stages.report --out artifacts/report`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.cli import console
from stages.cli.versions import read_versions
from stages.files import outputs
from stages.params.loading import load_params


def report(
    artifacts: Annotated[Path, typer.Option(help="The folder of what the stages made.")] = Path("artifacts"),
    data: Annotated[Path, typer.Option(help="The folder of rows, tokens and prompts.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="The folder to write index.html to.")] = Path("artifacts/report"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Write one page: scores with intervals, curves, answers side by side, the rows' ledger, hashes of all files."""
    settings = load_params(params_file, overrides or ())
    from stages.reporting.inputs import Project, read_run
    from stages.reporting.page import page

    outputs.refuse_foreign(out, ["index.html"])
    project = Project(artifacts, data)
    with console.progress("reading and hashing", total=project.size()) as advance:
        run = read_run(
            project, params=settings.model_dump(exclude={"runtime"}), versions=read_versions(), advance=advance
        )
    html = page(run)
    with outputs.replacing(out) as draft:
        draft.mkdir()
        (draft / "index.html").write_bytes(html.encode())
    console.say(f"{run.details['evaluate']['sentence']} → {out / 'index.html'}")


if __name__ == "__main__":
    console.main(report)
