"""prepare: kinds of files, schemas of rows, cleaning, splits, and the ledger. Each of its parameters does something."""

from __future__ import annotations

import gzip
import json
import re
import sys
import types
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.base.manifest import read_manifest
from stages.params.loading import ParamsError
from stages.prepare import prepare
from stages.prepared.splits import SPLITS
from tests.support.datasets import save
from tests.support.imports import ROOT

ALL_TO_TRAIN = ("prepare.valid_fraction=0.0", "prepare.test_fraction=0.0")
PAIRS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(200)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: str, rows: list[Any]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return target


def run(*sets: str, raw: str = "raw") -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, after the ledger was checked against them."""
    prepare([Path(raw)], overrides=list(sets))
    found = {
        name: [json.loads(line) for line in Path(f"data/prepared/{name}.jsonl").read_bytes().split(b"\n")[:-1]]
        for name in SPLITS
    }
    for name, rows in found.items():
        figures = ledger(name)
        assert figures["rows_used"] == len(rows)
        dropped = sum(count for key, count in figures.items() if key.startswith("dropped_"))
        assert figures["rows_in"] == figures["rows_used"] + dropped
    return found


def ledger(name: str = "all") -> dict[str, int]:
    return dict(json.loads(Path("artifacts/details/prepare.json").read_text(encoding="utf-8"))[name])


def contents(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("id", "source")}


ASKED = {"role": "user", "content": "q"}
ANSWERED = {"role": "assistant", "content": "a"}
ROUND = {"messages": [ASKED, ANSWERED]}
TOOL = {"type": "function", "function": {"name": "f"}}
QA = {"prompt": "### 질문:\nq\n\n### 답변:\n", "completion": "a"}
SCHEMAS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # a row, what becomes of it by the default template, and without a template
    ({"text": "t"}, {"text": "t"}, {"text": "t"}),
    ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}, ROUND),
    ({"question": "q", "answer": "a", "subject": "s"}, QA, ROUND),
    ({"instruction": "q", "input": "", "output": "a"}, QA, ROUND),
    ({"instruction": "q", "output": "a"}, QA, ROUND),
    (
        {"instruction": "q", "input": "i", "output": "a"},
        {"prompt": "### 질문:\nq\n\ni\n\n### 답변:\n", "completion": "a"},
        {"messages": [{"role": "user", "content": "q\n\ni"}, ANSWERED]},
    ),
    (ROUND, ROUND, ROUND),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ROUND, ROUND),
    ({"messages": json.dumps([ASKED, ANSWERED])}, ROUND, ROUND),
    (ROUND | {"tools": [TOOL]}, ROUND | {"tools": [TOOL]}, ROUND | {"tools": [TOOL]}),
]


@pytest.mark.parametrize(("row", "templated", "plain"), SCHEMAS)
def test_schemas_of_rows(row: dict[str, Any], templated: dict[str, Any], plain: dict[str, Any]) -> None:
    lines("raw/a.jsonl", [row])
    assert [contents(r) for r in run(*ALL_TO_TRAIN)["train"]] == [templated]
    assert [contents(r) for r in run(*ALL_TO_TRAIN, "prepare.template=null")["train"]] == [plain]


def test_the_template_may_name_any_columns() -> None:
    lines("raw/a.jsonl", [{"subject": "물리", "q": "왜?", "a": "그래서."}])
    [row] = run(*ALL_TO_TRAIN, 'prepare.template="[{subject}] {q} → {a}"')["train"]
    assert contents(row) == {"prompt": "[물리] 왜? → ", "completion": "그래서."}


def test_a_template_that_the_columns_do_not_fit_is_refused() -> None:
    lines("raw/a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(ValueError, match=r"raw/a.jsonl:1: prepare.template wants topic, the rows are question\+answer"):
        run('prepare.template="{topic}: {answer}"')


def test_all_files_are_checked_before_any_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines("raw/a.jsonl", [*PAIRS, {"question": 1, "answer": 2}])
    lines("raw/b.jsonl", [{"unknown": "x"}])
    with pytest.raises(ValueError, match=r"raw/b\.jsonl:1: no known columns"):
        run()


def test_columns_are_renamed() -> None:
    lines("raw/a.jsonl", [{"Frage": "q", "Antwort": "a"}])
    [row] = run(*ALL_TO_TRAIN, "prepare.columns={question: Frage, answer: Antwort}")["train"]
    assert contents(row) == QA


def test_the_seed_changes_who_is_held_out() -> None:
    lines("raw/a.jsonl", PAIRS)
    held_out = [{row["id"] for row in run(f"prepare.seed={seed}")["test"]} for seed in (0, 1)]
    assert held_out[0] != held_out[1]


def test_new_rows_move_no_old_ones() -> None:
    lines("raw/a.jsonl", PAIRS)
    before = {row["id"]: name for name, rows in run().items() for row in rows}
    lines("raw/b.jsonl", [{"question": f"And {i}?", "answer": "Yes."} for i in range(100)])
    after = {row["id"]: name for name, rows in run().items() for row in rows}
    assert before.items() <= after.items()


@pytest.mark.parametrize("name", ["valid", "test"])
def test_fractions_and_counts(name: str) -> None:
    lines("raw/a.jsonl", PAIRS)
    assert 40 < len(run(f"prepare.{name}_fraction=0.4")[name]) < 120
    assert len(run(f"prepare.{name}_fraction=null", f"prepare.{name}_rows=17")[name]) == 17
    with pytest.raises(ParamsError, match=f"exactly one of prepare.{name}_fraction and prepare.{name}_rows"):
        run(f"prepare.{name}_rows=17")


def test_groups_stay_together() -> None:
    lines("raw/a.jsonl", [{**row, "book": i // 10} for i, row in enumerate(PAIRS)])
    for sets in (
        ["prepare.valid_fraction=0.3", "prepare.test_fraction=0.3"],
        ["prepare.valid_fraction=null", "prepare.valid_rows=25"],
    ):
        found = run("prepare.group_by=book", *sets)
        books = {name: {int(row["source"].split(":")[1]) - 1 for row in rows} for name, rows in found.items()}
        books = {name: {number // 10 for number in numbers} for name, numbers in books.items()}
        assert sum(map(len, books.values())) == 20
    assert len(found["valid"]) == 30  # whole groups, until there are enough


def test_unicode_is_normalized() -> None:
    nfd = unicodedata.normalize("NFD", "한글")
    lines("raw/a.jsonl", [{"text": nfd}, {"text": "ｗｉｄｅ"}])
    texts = {form: [r["text"] for r in run(*ALL_TO_TRAIN, f"prepare.normalize={form}")["train"]] for form in FORMS}
    assert texts == {"null": [nfd, "ｗｉｄｅ"], "NFC": ["한글", "ｗｉｄｅ"], "NFKC": ["한글", "wide"]}
    assert ledger()["normalized"] == 2


FORMS = ("null", "NFC", "NFKC")


def test_control_characters_are_reported() -> None:
    lines("raw/a.jsonl", [{"text": "a\x07"}, {"text": "tab\tand\nline"}])
    assert len(run(*ALL_TO_TRAIN)["train"]) == 2
    assert ledger()["control_characters"] == 1


@pytest.mark.parametrize(("mode", "left"), [("keep", 4), ("exact", 3), ("normalized", 1)])
def test_duplicates(mode: str, left: int) -> None:
    lines("raw/a.jsonl", [{"text": text} for text in ("Same row", "Same row", "same  ROW", "Ｓame row")])
    assert len(run(*ALL_TO_TRAIN, f"prepare.duplicates={mode}")["train"]) == left
    dropped = {"keep": (0, 0), "exact": (1, 0), "normalized": (1, 2)}[mode]
    assert (ledger()["dropped_duplicate"], ledger()["dropped_normalized_duplicate"]) == dropped


def test_empty_rows_are_dropped_and_counted() -> None:
    lines("raw/a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q", "answer": " \n"}])
    lines("raw/b.jsonl", [ROUND, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}])
    run(*ALL_TO_TRAIN)
    assert ledger()["dropped_empty"] == 3


def test_zero_width_characters_alone_are_no_text() -> None:
    lines("raw/a.jsonl", [{"text": "t"}, {"text": "\u200b\ufeff"}, {"text": "\u200bu"}])
    assert [row["text"] for row in run(*ALL_TO_TRAIN)["train"]] == ["t", "\u200bu"]
    assert ledger()["dropped_empty"] == 1


def test_an_empty_system_turn_or_tool_result_costs_no_row() -> None:
    quiet = [{"role": "system", "content": ""}, ASKED, {"role": "tool", "content": ""}, ANSWERED]
    lines("raw/a.jsonl", [{"messages": quiet}])
    [row] = run(*ALL_TO_TRAIN)["train"]
    assert row["messages"] == quiet[1:]


def test_cells_that_spell_a_missing_value_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    Path("raw").mkdir()
    Path("raw/a.csv").write_text("instruction,input,Antwort\nq,nan,a\nq2,,None\nq3,N/A,\nnull,x,y\n", encoding="utf-8")
    [row] = run(*ALL_TO_TRAIN, "prepare.columns={output: Antwort}")["train"]
    assert contents(row) == QA
    assert (ledger()["dropped_missing"], ledger()["dropped_empty"]) == (2, 1)
    assert "a cell that spells a missing value (nan, None, NA, …) is empty" in capsys.readouterr().out


def test_the_words_of_missing_values_are_text_in_json() -> None:
    lines("raw/a.jsonl", [{"text": "None"}])
    assert len(run(*ALL_TO_TRAIN)["train"]) == 1


def test_rows_that_only_join_to_the_same_text_are_two_rows() -> None:
    lines("raw/a.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}])
    assert len({row["id"] for row in run(*ALL_TO_TRAIN)["train"]}) == 2


def test_labels_are_an_error_or_drop_rows_or_are_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    lines("raw/a.jsonl", [{**PAIRS[i], "label": i % 3 != 0} for i in range(30)])
    with pytest.raises(ValueError, match=r"raw/a.jsonl:1: its 'label' says whether the answer is wanted; set prepare"):
        run(*ALL_TO_TRAIN)
    assert len(run(*ALL_TO_TRAIN, "prepare.labels=drop_false")["train"]) == 20
    assert ledger()["dropped_label_false"] == 10
    assert "not read" not in capsys.readouterr().out
    assert len(run(*ALL_TO_TRAIN, "prepare.labels=ignore")["train"]) == 30
    assert "raw/a.jsonl: not read: label" in capsys.readouterr().out


def test_preference_pairs_are_an_error_or_give_their_chosen_answer() -> None:
    lines("raw/a.jsonl", [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
    with pytest.raises(ValueError, match=r"raw/a.jsonl:1: is a preference pair \(chosen, rejected\); set prepare"):
        run(*ALL_TO_TRAIN)
    found = run(*ALL_TO_TRAIN, "prepare.preferences=chosen")["train"]
    assert [contents(row) for row in found] == [{"prompt": f"q{i}", "completion": "a"} for i in range(3)]


def test_what_nobody_reads_is_named_once_for_each_source(capsys: pytest.CaptureFixture[str]) -> None:
    lines("raw/a.jsonl", [{**row, "source": "web", "book": 1, "empty": None} for row in PAIRS[:9]])
    lines("raw/b.jsonl", [{"messages": [{**ASKED, "time": 1}, ANSWERED], "id": 1}, {**ROUND, "score": 2}])
    lines("raw/valid.jsonl", PAIRS[10:12])
    lines("raw/test.jsonl", [{**PAIRS[13], "n\n": 1}])
    run()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "not read" in line] == [
        "raw/test.jsonl: not read: 'n\\n'",
        "raw/a.jsonl: not read: source, book",
        "raw/b.jsonl: not read: id, messages.time, score",
    ]
    sources = json.loads(Path("data/prepared/sources.json").read_text(encoding="utf-8"))["sources"]
    assert {name: about["not_read"] for name, about in sources.items()} == {
        "raw/a.jsonl": ["source", "book"],
        "raw/b.jsonl": ["id", "messages.time", "score"],
        "raw/test.jsonl": ["n\n"],
        "raw/valid.jsonl": [],
    }
    assert [ledger(name)["unread_columns"] for name in ("train", "valid", "test", "all")] == [5, 0, 1, 6]


def test_the_column_that_groups_rows_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    lines("raw/a.jsonl", [{**row, "book": i} for i, row in enumerate(PAIRS)])
    run("prepare.group_by=book")
    assert "not read" not in capsys.readouterr().out


def test_long_rows_are_dropped_and_counted() -> None:
    lines("raw/a.jsonl", [{"text": "short"}, {"text": "long" * 100}])
    assert len(run(*ALL_TO_TRAIN, "prepare.max_chars=100")["train"]) == 1
    assert ledger()["dropped_too_long"] == 1


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train-00000-of-00001", "validation", "test_1")])
def test_rows_that_are_split_already_keep_their_splits(names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        lines(f"raw/{name}.jsonl", PAIRS[i * 10 : i * 10 + 5])
    assert {name: len(rows) for name, rows in run().items()} == {"train": 5, "valid": 5, "test": 5}


def test_folders_tell_the_split_too_and_a_missing_one_is_taken_from_train() -> None:
    lines("raw/train/a.jsonl", PAIRS[:150])
    lines("raw/dev/b.jsonl", PAIRS[150:])
    found = run("prepare.test_fraction=0.2")
    assert len(found["valid"]) == 50
    assert 10 < len(found["test"]) < 60
    assert all("train" in row["source"] for row in found["test"])


def test_leaks_are_dropped_from_train_or_refused() -> None:
    lines("raw/train.jsonl", PAIRS[:5])
    lines("raw/valid.jsonl", [*PAIRS[5:8], PAIRS[0]])
    lines("raw/test.jsonl", [*PAIRS[8:10], PAIRS[1], PAIRS[5]])
    found = run()
    assert {name: len(rows) for name, rows in found.items()} == {"train": 3, "valid": 3, "test": 4}
    assert (ledger("train")["dropped_leaked"], ledger("valid")["dropped_leaked"]) == (2, 1)
    for sets in ([], ["prepare.on_bad_row=skip"]):
        with pytest.raises(ValueError, match=r"raw/valid.jsonl:1: stands in another split too; remove it"):
            run("prepare.leaks=error", *sets)


def test_near_duplicates_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    text = "The quick brown fox jumps over the lazy dog and runs away into the deep dark forest."
    lines("raw/a.jsonl", [{"text": text}, {"text": "Nothing of the kind, by any means."}, {"text": text + " Yes."}])
    assert len(run(*ALL_TO_TRAIN, "prepare.near_duplicates=0.8")["train"]) == 3
    assert ledger()["near_duplicates"] == 1
    assert "raw/a.jsonl:3 resembles raw/a.jsonl:1" in capsys.readouterr().out


def test_near_duplicates_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    lines("raw/a.jsonl", PAIRS)
    with pytest.raises(ValueError, match="needs the rensa library; install it with: pip install"):
        run("prepare.near_duplicates=0.8")


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, revision: str | None) -> dict[str, list[dict[str, str]]]:
        asked.append((name, revision))
        return {"train": PAIRS[:100], "validation": PAIRS[100:110], "test": PAIRS[110:]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = run("prepare.dataset=org/name@v1")
    assert asked == [("org/name", "v1")]
    assert found["valid"][0]["source"] == "org/name@v1/validation:1"
    assert {name: len(rows) for name, rows in found.items()} == {"train": 100, "valid": 10, "test": 90}


def test_a_dataset_of_the_hub_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="org/name needs the datasets library; install it with: pip install"):
        run("prepare.dataset=org/name")


def test_a_dataset_dict_saved_to_disk_keeps_its_splits() -> None:
    for i, name in enumerate(("train", "validation", "test")):
        save(Path(f"raw/{name}"), [{"question": f"{name} {j}?", "answer": "a"} for j in range(80 + i)])
    Path("raw/dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}', encoding="utf-8")
    found = run()
    assert {name: len(rows) for name, rows in found.items()} == {"train": 80, "valid": 81, "test": 82}
    assert found["train"][75]["source"] == "raw/train/data-00001-of-00002.arrow:6"


def test_other_kinds_of_files_hold_the_same_rows() -> None:
    lines("jsonl/a.jsonl", PAIRS)
    whole = {name: [contents(row) for row in rows] for name, rows in run(raw="jsonl").items()}
    text = Path("jsonl/a.jsonl").read_text(encoding="utf-8")
    Path("raw").mkdir()
    for name, data in {
        "a.jsonl.gz": gzip.compress(text.encode()),
        "a.jsonl": b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode(),
        "a.json": json.dumps(PAIRS, indent=2).encode(),
        "b.json": text.encode(),
        "a.tsv": ("question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in PAIRS)).encode(),
    }.items():
        (Path("raw") / name).write_bytes(data)
        assert {split: [contents(row) for row in rows] for split, rows in run().items()} == whole, name
        (Path("raw") / name).unlink()
    pq.write_table(pa.Table.from_pylist(PAIRS), "raw/a.parquet")
    assert {split: [contents(row) for row in rows] for split, rows in run().items()} == whole


def test_a_quoted_cell_may_hold_lines() -> None:
    Path("raw").mkdir()
    Path("raw/a.csv").write_text('question,answer\n"a\n""b""",x\nlast,y\n', encoding="utf-8")
    found = run(*ALL_TO_TRAIN)["train"]
    assert found[0]["prompt"] == '### 질문:\na\n"b"\n\n### 답변:\n'
    assert [row["source"] for row in found] == ["raw/a.csv:2", "raw/a.csv:4"]


def test_files_that_are_no_rows_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines("raw/a.jsonl", PAIRS)
    Path("raw/notes.docx").write_bytes(b"")
    run()
    assert "passed over: raw/notes.docx" in capsys.readouterr().out


def test_test_rows_carry_columns_that_training_rows_do_not_depend_on(project: Path) -> None:
    from stages.fetch import fetch
    from stages.tokenize import tokenize
    from stages.tokens.parquet import read_tokens

    def made(*overrides: str) -> tuple[bytes, Any]:
        prepare(overrides=list(overrides))
        tokenize()
        identity = read_manifest(Path("artifacts/base.json")).tokenizer_identity
        return Path("data/tokens/train.parquet").read_bytes(), read_tokens(
            Path("data/tokens/test.parquet"), tokenizer=identity
        )

    rows = [{"question": f"{i}?", "answer": "yes", "subject": "math", "level": i % 2} for i in range(40)]
    Path("data/raw/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fetch()
    without, plain = made()
    carried, labelled = made("prepare.carry=[subject, level]")
    assert carried == without
    assert plain[0].carried == {} and labelled[0].carried in (
        {"subject": "math", "level": "0"}, {"subject": "math", "level": "1"},
    )  # fmt: skip
    grouped = made("prepare.group_by=question")[1]
    assert all((row.group or "").endswith("?") for row in grouped)


@pytest.mark.parametrize(
    ("value", "said"), [("[x]", "no row has anything in 'x'"), ("[a]", "rows.jsonl:1: has no text or number in 'a'")]
)
def test_a_column_that_cannot_be_carried_is_named(project: Path, value: str, said: str) -> None:
    Path("data/raw/rows.jsonl").write_text(
        "".join(f'{{"question": "{i}?", "answer": "yes", "a": [1]}}\n' for i in range(40)), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        prepare(overrides=[f"prepare.carry={value}"])
