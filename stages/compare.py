"""Two or more runs on the same test rows: is one better, and what is different in them?

`python -m stages compare` (the workspace against the last commit), `compare EXP`, `compare A B C`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.cli import console
from stages.params.loading import PARAMS_FILE

if TYPE_CHECKING:
    from stages.results.pairs import Comparison

WORKSPACE = "workspace"
_ROWS, _ANSWERS = "artifacts/evaluate/rows.parquet", "artifacts/evaluate/answers.parquet"
_LONGEST = 300  # characters of an answer that are shown


@dataclass(frozen=True)
class Revision:
    """A run: its test rows with their scores, its answers by row, and what it was made from."""

    name: str
    rows: list[dict[str, Any]]
    answers: Mapping[str, dict[str, Any]]
    settings: Mapping[str, str]  # parameters, versions, base model, data: name → value


def compare(
    revisions: Annotated[
        list[str] | None,
        typer.Argument(
            help="Experiments, branches, tags or commits; the first is what the others are held against. "
            "None: HEAD and the workspace; one: HEAD and that one.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Rows to show that got most better, and most worse.")] = 3,
    experiments: Annotated[
        bool, typer.Option("--experiments", help="HEAD and every experiment of it. `make experiments` does this.")
    ] = False,
) -> None:
    """The difference in loss on the test rows that runs have in common, with its 95% interval. Nothing is trained.

    Of several runs, a ranked table against the first, with intervals widened for the number of comparisons. The
    interval is over test rows: it says how sure it is that this adapter is better than that one on such rows. Runs
    that differ from the first by their seed alone tell what chance in training makes: that widens the others' too.
    """
    from stages.results import pairs
    from stages.results.intervals import LEVEL

    names = {0: ["HEAD", WORKSPACE], 1: ["HEAD", *(revisions or [])]}.get(len(revisions or []), revisions or [])
    if experiments:
        names = ["HEAD", *_experiments()]
    with console.progress("reading", total=len(names)) as advance:
        runs = []
        for name in names:
            runs.append(_read(name))
            advance(1)
    first, *others = runs
    level = 1 - (1 - LEVEL) / len(others)
    compared = [pairs.compare(first.rows, run.rows, level=level, names=(first.name, run.name)) for run in others]
    title = f"Against {first.name}; intervals of {level:.2%}, for {len(others)} comparisons"
    twins = [_differing(first, run) == ["seed"] for run in others]
    if of_seeds := [found.difference.value for found, is_twin in zip(compared, twins, strict=True) if is_twin]:
        half = pairs.seed_noise(of_seeds, level=level)
        title += f", with what {len(of_seeds)} other seed{'s make' if len(of_seeds) > 1 else ' makes'}"
        compared = [
            pairs.of_another_seed(found) if is_twin else pairs.with_seed_noise(found, half)
            for found, is_twin in zip(compared, twins, strict=True)
        ]
    if len(others) > 1:
        _show_ranked(title, others, compared)
        return
    _show_differences(first, others[0])
    _show_rows(first, others[0], compared[0], count)
    console.say(f"{others[0].name} against {first.name}: {compared[0].sentence}")
    for line in compared[0].notes:
        console.say(line)


def _experiments() -> list[str]:
    """The names of all experiments of the last commit, as `dvc exp list` tells them.

    Raises:
        ValueError: there are none.
    """
    from dvc.repo import Repo

    with Repo() as repo:
        names = [name for found in repo.experiments.ls().values() for name, _ in found]
    if not names:
        raise ValueError("this commit has no experiment; make one with: dvc exp run -S train.learning_rate=1e-4")
    return sorted(names)


def _read(name: str) -> Revision:
    """A run's files, as they are in the workspace or as DVC keeps them for a revision.

    Raises:
        ValueError: there is no such revision, or a file of it is not here.
    """
    from stages.results import pairs
    from stages.tables.parquet import parse_table

    files = _Files(name)
    rows = parse_table(files.read(_ROWS), f"{_ROWS} of {name}", pairs.COLUMNS)
    answers = parse_table(files.read(_ANSWERS), f"{_ANSWERS} of {name}", ("id", "reference", "tuned"))
    return Revision(
        name,
        rows.select(list(pairs.COLUMNS)).to_pylist(),
        {row["id"]: row for row in answers.to_pylist()},
        _settings(files),
    )


def _settings(files: _Files) -> dict[str, str]:
    """All that a run was made from, by name."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    settings = _flat(yaml.load(files.read(str(PARAMS_FILE)).decode()))
    settings |= {
        f"version of {key}": str(value) for key, value in yaml.load(files.read("versions.yaml").decode()).items()
    }
    base = json.loads(files.read("artifacts/base.json"))
    settings |= {f"base {key}": str(base.get(key)) for key in ("source", "revision")}
    lock = yaml.load(files.read("dvc.lock").decode())
    for stage in ("prepare", "tokenize"):
        for out in lock["stages"].get(stage, {}).get("outs", ()):
            if str(out["path"]).startswith("data/"):
                settings[f"{out['path']} (md5)"] = str(out["md5"])
    return settings


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for section, part in tree.items():
        keys = {f"{section}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {section: part}
        flat |= {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in keys.items()}
    return flat


class _Files:
    """The files of a revision, or of the workspace."""

    def __init__(self, name: str) -> None:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.repo import Repo
        from dvc.scm import RevError, SCMError, resolve_rev

        self._name = name
        try:
            if name != WORKSPACE:
                with Repo() as repo:
                    resolve_rev(repo.scm, name)
            self._files = DVCFileSystem(rev=None if name == WORKSPACE else name)
        except (RevError, SCMError) as error:
            raise ValueError(
                f"{name}: no such experiment, branch, tag or commit ({error}); see: dvc exp list"
            ) from None
        except (NotDvcRepoError, DvcException) as error:
            raise ValueError(f"{error}; run this in the project's folder") from None

    def read(self, path: str) -> bytes:
        try:
            content: bytes = self._files.cat_file(path)
        except Exception:  # the layers of DVC's storage have errors of their own for what is not there
            hint = "make it with: dvc repro"
            if self._name != WORKSPACE:
                hint = "if it was made and pushed, get it with: dvc pull --all-commits (experiments: dvc exp pull)"
            raise ValueError(f"{path} of {self._name} is not here; {hint}") from None
        return content


def _differing(first: Revision, other: Revision) -> list[str]:
    """The names of the settings that two runs do not share."""
    return [key for key in {**first.settings, **other.settings} if first.settings.get(key) != other.settings.get(key)]


def _show_differences(first: Revision, other: Revision) -> None:
    """A table of the parameters, versions, base models and data in which two runs differ."""
    names = _differing(first, other)
    if not names:
        console.say("The same parameters, versions, base model and data.")
        return
    lines = [(key, first.settings.get(key, "-"), other.settings.get(key, "-")) for key in names]
    console.table("What differs", ("", first.name, other.name), lines, numeric=False)


def _show_rows(first: Revision, other: Revision, compared: Comparison, count: int) -> None:
    """The rows whose loss fell most and rose most, with both runs' answers."""
    from stages.results import words

    for title, rows in (("Most better", compared.best(count)), ("Most worse", compared.worst(count))):
        for row in rows:
            answered = [run.answers.get(row.id) for run in (first, other)]
            lines = [("loss, nats a token", words.number(row.before), words.number(row.after))]
            if answered[0] and answered[1]:
                lines.append(("answer", _shortened(answered[0]["tuned"]), _shortened(answered[1]["tuned"])))
            console.table(f"{title}: {row.source}", ("", first.name, other.name), lines, numeric=False)
            if answered[0]:
                console.say(f"reference: {_shortened(answered[0]['reference'])}")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _show_ranked(title: str, others: Sequence[Revision], compared: Sequence[Comparison]) -> None:
    """A line a run, the largest gain first."""
    from stages.results import words

    both = sorted(zip(others, compared, strict=True), key=lambda pair: pair[1].difference.value)
    lines = [
        (run.name, f"{found.rows:,}", f"{found.better:,}", words.signed(found.difference), found.verdict)
        for run, found in both
    ]
    header = ("", "rows", "better", compared[0].unit, "")
    console.table(title, header, lines)


if __name__ == "__main__":
    console.main(compare)
