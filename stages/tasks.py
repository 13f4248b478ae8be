"""Tasks of the LM Evaluation Harness, by the base model and by the merged one: `python -m stages tasks arc_easy`.

The library comes with `pip install '.[tasks]'`. Unlike the stages, it may ask the network: most tasks' data lie on the
Hub. mlx-lm's own evaluator runs the models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.cli.settings import load_settings
from stages.files import outputs

Scores = dict[tuple[str, str], tuple[float, float | None]]  # (task, metric) → value, standard error


def tasks(
    names: Annotated[list[str], typer.Argument(metavar="TASK…", help="Names of tasks: lm-eval ls tasks.")],
    merged: Annotated[Path, typer.Option(help="The model that merge wrote.")] = Path("artifacts/merged"),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    include: Annotated[
        Path | None, typer.Option(help="A folder with the YAML files of your own tasks.", show_default=False)
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task, at most.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="The scores to write.")] = Path("artifacts/tasks.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Score base and merged model on public tasks, each score with its standard error."""
    settings = load_settings(params_file, overrides)
    from stages.model.load import require_merged

    evaluator = _library()
    folders = {"base": locate(read_manifest(base_file)), "merged": require_merged(merged)}
    manager = _manager(include, names)
    options = {"num_fewshot": shots, "limit": limit, "batch_size": batch_size, "task_manager": manager}
    scores = {
        name: _scores(evaluator.simple_evaluate(model=_model(folder, settings), tasks=names, **options))
        for name, folder in folders.items()
    }
    outputs.write_json(
        out,
        {
            name: {
                f"{task} {metric}": {"value": value, "error": error} for (task, metric), (value, error) in of.items()
            }
            for name, of in scores.items()
        },
    )
    lines = [
        (task, metric, _shown(*scores["base"][task, metric]), _shown(*scores["merged"][task, metric]))
        for task, metric in scores["base"]
    ]
    console.table(f"Value ± standard error → {out}", ("task", "metric", *folders), lines)


def _library() -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval import evaluator
    except ImportError:
        raise ValueError("tasks needs the lm-eval library; install it with: pip install '.[tasks]'") from None
    return evaluator


def _manager(include: Path | None, names: list[str]) -> Any:
    """The known tasks.

    Raises:
        ValueError: some of those wanted are not among them.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ValueError(f"{include}: no such folder; --include wants one with the YAML files of tasks")
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"no task is called {', '.join(unknown)}; see: lm-eval ls tasks (your own: --include)")
    return manager


def _model(folder: Path, settings: Any) -> Any:
    """mlx-lm's evaluator of a model, in the float type that suits the device."""
    from stages.decoding.decode import load_decoder
    from stages.model.load import load_base  # the BLAS comes before MLX

    from mlx_lm import evaluate  # isort: skip

    trust = settings.model.trust_remote_code
    with console.progress(f"loading {folder.name}"):
        model, config = load_base(folder, dtype=settings.model.dtype, trust_remote_code=trust)
        tokenizer = load_decoder(folder, config, trust_remote_code=trust)
    # The evaluator would load the model itself, in its file's own type.
    with patch.object(evaluate, "load", lambda *_, **__: (model, tokenizer)):
        return evaluate.MLXLM(str(folder))


def _scores(results: Mapping[str, Any]) -> Scores:
    """The numbers of each task: lm-eval calls them `acc,none` and `acc_stderr,none`."""

    def found() -> Iterator[tuple[tuple[str, str], tuple[float, float | None]]]:
        for task, numbers in results["results"].items():
            for key, value in numbers.items():
                metric, _, kind = key.partition(",")
                if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                    error = numbers.get(f"{metric}_stderr,{kind}")
                    yield (task, metric), (float(value), float(error) if isinstance(error, int | float) else None)

    return dict(found())


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


if __name__ == "__main__":
    console.main(tasks)
