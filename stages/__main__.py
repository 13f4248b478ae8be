"""The command line: `python -m stages COMMAND`."""

import typer

from stages.baseline import baseline
from stages.chat import chat
from stages.cli import console
from stages.compare import compare
from stages.convert import convert
from stages.doctor import doctor
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.generate import generate
from stages.inspect import inspect
from stages.merge import merge
from stages.plots import plots
from stages.prepare import prepare
from stages.report import report
from stages.serve import serve
from stages.show import show
from stages.tasks import tasks
from stages.tokenize import tokenize
from stages.train import train

app = typer.Typer(
    name="python -m stages",
    help="A LoRA fine-tune as a build. `dvc repro` runs the stages; each is a command too.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for stage in (fetch, prepare, tokenize, baseline, train, merge, evaluate, generate, report):
    app.command(rich_help_panel="Stages, in the DAG's order")(stage)
for use in (chat, serve):
    app.command(rich_help_panel="The result in use")(use)
for tool in (inspect, show, compare, convert, plots, tasks, doctor):
    app.command(rich_help_panel="Around them")(tool)

if __name__ == "__main__":
    console.run(app)
