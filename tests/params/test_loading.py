"""params.yaml: everything wrong is reported at once, with its dotted path and its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.params.loading import ParamsError, load_params
from tests.support.imports import ROOT

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ParamsError) as error:
        load_params(path, overrides)
    return [line.replace(str(path), "params.yaml") for line in str(error.value).splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def line_of(text: str, key: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if line.strip().startswith(key))


def test_the_committed_file_is_valid() -> None:
    assert load_params(ROOT / "params.yaml").lora.targets == ["q_proj", "v_proj"]


def test_all_mistakes_are_reported_at_once_with_their_lines(file: Path) -> None:
    text = TEXT.replace("rank: 8", "rnak: 8").replace("valid_fraction: 0.06", "valid_fraction: 1.5")
    text = text.replace("learning_rate: 0.003", "learning_rate: fast")
    file.write_text(text, encoding="utf-8")
    found = problems(file)
    assert [line.split(": ")[0] + " " + line.split(": ")[1] for line in found] == [
        f"params.yaml:{line_of(text, 'valid_fraction')} prepare.valid_fraction",
        f"params.yaml:{line_of(text, 'lora:')} lora.rank",
        f"params.yaml:{line_of(text, 'rnak')} lora.rnak",
        f"params.yaml:{line_of(text, 'learning_rate')} train.learning_rate",
    ]
    assert "did you mean 'rank'?" in found[2]
    assert found[3].endswith("must be a valid number, not 'fast'")


def test_scientific_notation_is_a_number(file: Path) -> None:
    assert load_params(file, ["train.learning_rate=5e-05"]).train.learning_rate == 5e-5
    file.write_text(TEXT.replace("learning_rate: 0.003", "learning_rate: 5e-05"), encoding="utf-8")
    assert load_params(file).train.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.rnak=8", "--set lora.rnak=8: unknown key; did you mean 'rank'?"),
        ("train.learning_rate=fast", "--set train.learning_rate=fast: must be a valid number, not 'fast'"),
        ("train.learning_rate=.nan", "--set train.learning_rate=.nan: must be a finite number, not nan"),
        ("train.batch_size=0", "--set train.batch_size=0: must be greater than or equal to 1, not 0"),
        ("train.batch_size=2.5", "--set train.batch_size=2.5: must be a valid integer, not 2.5"),
        ("train.batch_size='4'", "--set train.batch_size='4': must be a valid integer, not '4'"),
        ("model.cpu_kernels=1", "--set model.cpu_kernels=1: must be a valid boolean, not 1"),
        ("lora.targets=[]", "--set lora.targets=[]: list should have at least 1 item after validation, not 0"),
        ("lora.type=dara", "--set lora.type=dara: must be 'lora' or 'dora', not 'dara'"),
        ("lroa.rank=8", "--set lroa.rank=8: there is no section 'lroa'; did you mean 'lora'?"),
        ("rank", "--set rank: write it as section.key=value"),
        ("lora.rank=[", "--set lora.rank=[: '[' is not a YAML value; quote it"),
        ("lora.rank.x=1", "--set lora.rank.x=1: there is no section 'rank'"),
    ],
)
def test_a_bad_override_is_one_clear_line(file: Path, override: str, line: str) -> None:
    found = problems(file, override)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_epochs_and_iters_exclude_each_other(file: Path) -> None:
    assert "exactly one of train.epochs and train.iters" in problems(file, "train.epochs=1", "train.iters=5")[0]
    assert "exactly one of train.epochs and train.iters" in problems(file, "train.epochs=null", "train.iters=null")[0]


def test_batches_are_by_rows_or_by_tokens(file: Path) -> None:
    assert "exactly one of train.batch_size and train.batch_tokens" in problems(file, "train.batch_tokens=512")[0]
    assert "exactly one of train.batch_size and train.batch_tokens" in problems(file, "train.batch_size=null")[0]
    assert load_params(file, ["train.batch_size=null", "train.batch_tokens=512"]).train.batch_tokens == 512


def test_alpha_and_scale_exclude_each_other(file: Path) -> None:
    assert "exactly one of lora.alpha and lora.scale" in problems(file, "lora.scale=2.0")[0]
    assert "exactly one of lora.alpha and lora.scale" in problems(file, "lora.alpha=null")[0]
    lora = load_params(file, ["lora.alpha=null", "lora.scale=2.0"]).lora
    assert (lora.alpha, lora.scale) == (None, 2.0)


def test_rank_stabilisation_needs_alpha(file: Path) -> None:
    found = problems(file, "lora.alpha=null", "lora.scale=2.0", "lora.rank_stabilized=true")
    assert "rank_stabilized divides alpha" in found[0]


@pytest.mark.parametrize(("written", "read"), [("4", 4), ("all", "all"), ("[0, 2]", [0, 2])])
def test_layers_are_a_number_all_or_a_list(file: Path, written: str, read: object) -> None:
    assert load_params(file, [f"lora.layers={written}"]).lora.layers == read


@pytest.mark.parametrize("written", ["0", "-1", "2.5", "some", "[]", "[-1]", "[1, 1]", "[a]", "true", "null"])
def test_other_layers_are_one_clear_line(file: Path, written: str) -> None:
    (line,) = problems(file, f"lora.layers={written}")
    assert line.startswith(f"--set lora.layers={written}: must be how many of the last layers, 'all', or a list of")


def test_fractions_must_leave_rows_to_train_on(file: Path) -> None:
    assert "less than 1" in problems(file, "prepare.valid_fraction=0.5", "prepare.test_fraction=0.5")[0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"seed: [", "params.yaml:1: not valid YAML: "),
        (b"- 1\n", "params.yaml: must hold sections"),
        (b"", "params.yaml: must hold sections"),
        (b"\xff\xfe", "params.yaml: not UTF-8"),
    ],
)
def test_a_broken_file_is_one_clear_line(file: Path, content: bytes, line: str) -> None:
    file.write_bytes(content)
    found = problems(file)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "params.yaml")[0]
