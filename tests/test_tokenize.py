"""tokenize: the token files, their metadata, the ledger and the plot. Each of its parameters does something."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.fetch import fetch
from stages.prepare import prepare
from stages.prepared.splits import SPLITS
from stages.tokenize import tokenize
from stages.tokens.parquet import read_metadata, read_tokens
from tests.support.datasets import save
from tests.support.tokenizers import CHATML

ALL_TO_TRAIN = ("prepare.valid_fraction=0.0", "prepare.test_fraction=0.0")
PAIRS = [{"question": f"What is {i}, {'or not, ' * (i % 7)}?", "answer": f"It is {i}."} for i in range(120)]
TALK = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "yy"},
    {"role": "user", "content": "z"},
    {"role": "assistant", "content": "ww"},
]


@pytest.fixture(autouse=True)
def raw(project: Path) -> Path:
    """An empty folder for rows, in a project whose base model is there."""
    fetch()
    folder = project / "raw"
    folder.mkdir()
    return folder


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(*sets: str, to_train: bool = True) -> pa.Table:
    """The training rows."""
    prepare([Path("raw")], overrides=list(ALL_TO_TRAIN) if to_train else [])
    tokenize(overrides=list(sets))
    return pq.read_table("data/tokens/train.parquet")


def ledger(name: str = "all") -> dict[str, Any]:
    return dict(json.loads(Path("artifacts/details/tokenize.json").read_text(encoding="utf-8"))[name])


def learned(table: pa.Table) -> list[bytes]:
    """The trained bytes of each row: the tiny tokenizer's ids are the places of bytes in its alphabet."""
    from stages.base.manifest import locate, read_manifest
    from stages.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(locate(read_manifest(Path("artifacts/base.json"))))
    rows = zip(table["input_ids"].to_pylist(), table["loss_mask"].to_pylist(), strict=True)
    return [tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]).encode() for ids, mask in rows]


def test_the_same_rows_in_any_kind_of_file_give_the_same_tokens(raw: Path) -> None:
    """Compared: every column but `source`, the splits, and the footer but for `sources`; then the files' own bytes,
    where both came by the same file name."""
    made: dict[str, Any] = {}
    for kind in ("jsonl", "csv", "parquet", "arrow"):
        path = raw / "rows"
        if kind == "jsonl":
            lines(raw / "rows.jsonl", PAIRS)
        elif kind == "csv":
            with (raw / "rows.csv").open("w", encoding="utf-8", newline="") as cells:
                writer = csv.DictWriter(cells, ["question", "answer"])
                writer.writeheader()
                writer.writerows(PAIRS)
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(PAIRS), raw / "rows.parquet")
        else:
            save(path, PAIRS)
        run(to_train=False)
        made[kind] = {}
        for name in SPLITS:
            file = Path(f"data/tokens/{name}.parquet")
            about = read_metadata(file)
            assert about.pop("sources")
            made[kind][name] = (digest(pq.read_table(file).drop_columns(["source"])), about)
        for entry in raw.iterdir():
            entry.rename(raw.parent / f"{kind}-{entry.name}")
    assert made["jsonl"] == made["csv"] == made["parquet"] == made["arrow"]


def digest(table: pa.Table) -> bytes:
    """The table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="none")
    return bytes(sink.getvalue())


def test_the_same_input_gives_the_same_bytes(raw: Path) -> None:
    lines(raw / "rows.jsonl", PAIRS)
    run(to_train=False)
    before = [Path(f"data/tokens/{name}.parquet").read_bytes() for name in SPLITS]
    run(to_train=False)
    assert [Path(f"data/tokens/{name}.parquet").read_bytes() for name in SPLITS] == before


def test_a_token_file_says_what_it_is_made_of(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}])
    table = run(f"tokenize.chat_template={json.dumps(CHATML)}")
    about = read_metadata(Path("data/tokens/train.parquet"))
    assert about["policy"]["train_on"] == "completion"
    assert len(about["chat_template"]) == 64
    assert len(about["sources"]["raw/rows.jsonl"]["sha256"]) == 64
    assert about["ledger"]["rows_in"] == 1
    assert table["tokens"].to_pylist() == [len(row) for row in table["input_ids"].to_pylist()]
    assert table["trained_tokens"].to_pylist() == [sum(row) for row in table["loss_mask"].to_pylist()]
    assert table.schema.field("input_ids").type == pa.list_(pa.int32())
    assert table["source"].to_pylist() == ["raw/rows.jsonl:1"]
    [row] = read_tokens(Path("data/tokens/train.parquet"), tokenizer=about["tokenizer"])
    assert row.input_ids.tolist() == table["input_ids"].to_pylist()[0]
    assert row.loss_mask.tolist() == table["loss_mask"].to_pylist()[0]


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), [b"a<|end|>"]),
        (("tokenize.train_on=all",), [b"a<|end|>"]),
        (("tokenize.add_eos=false",), [b"a"]),
    ],
)
def test_train_on_and_add_eos(raw: Path, sets: tuple[str, ...], expected: list[bytes]) -> None:
    lines(raw / "rows.jsonl", [{"prompt": "q", "completion": "a"}])
    assert learned(run(*sets)) == expected


def test_answer_marker(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"text": "### 질문:\nq\n\n### 답변:\na"}])
    assert learned(run('tokenize.answer_marker="### 답변:\\n"')) == [b"a<|end|>"]


@pytest.mark.parametrize(
    ("train_on", "expected"), [("assistant", b"yy<|im_end|>ww<|im_end|>"), ("last_assistant", b"ww<|im_end|>")]
)
def test_conversations(raw: Path, train_on: str, expected: bytes) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}])
    sets = (f"tokenize.train_on={train_on}", f"tokenize.chat_template={json.dumps(CHATML)}")
    # In the tiny vocabulary <|im_end|> is ordinary text: the turn's end is learned to the line's end, and EOS follows.
    assert [text.replace(b"\n", b"").replace(b"<|end|>", b"") for text in learned(run(*sets))] == [expected]


def test_question_marker(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"text": "Q: 1\nA: one\nQ: 2\nA: two"}])
    sets = ('tokenize.answer_marker="A: "', 'tokenize.question_marker="\\nQ: "')
    assert learned(run(*sets)) == [b"onetwo<|end|>"]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: has 2 answers .* in tokenize\.question_marker"):
        run(sets[0])
    with pytest.raises(ValueError, match="set answer_marker too"):
        run(sets[1])


def test_special_in_content(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(raw / "rows.jsonl", [{"prompt": "q", "completion": "a<|pad|>b"}])
    assert run()["tokens"].to_pylist() == [11]
    assert ledger()["special_in_content"] == 1
    assert "1 rows spell control tokens" in " ".join(capsys.readouterr().out.split())
    assert run("tokenize.special_in_content=allow")["tokens"].to_pylist() == [5]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: spells the control token <\|pad\|>; correct the row, or set"):
        run("tokenize.special_in_content=error")


def test_the_date_that_a_template_reads(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}])
    template = CHATML.replace("m.content", "strftime_now('%Y') + m.content")
    dated = f"tokenize.chat_template={json.dumps(template)}"
    assert b"2026yy" in learned(run(dated, "tokenize.train_on=all"))[0]
    assert b"2027yy" in learned(run(dated, "tokenize.train_on=all", "tokenize.date=2027-01-31"))[0]
    with pytest.raises(ValueError, match=r"tokenize\.date.*must be a date, such as 2026-01-31"):
        run(dated, "tokenize.date=tomorrow")


def test_thoughts(raw: Path) -> None:
    turns = [*TALK[:3], {"role": "assistant", "content": "<think>hm</think>ww"}]
    lines(raw / "rows.jsonl", [{"messages": turns}])
    sets = (f"tokenize.chat_template={json.dumps(CHATML)}", "tokenize.train_on=last_assistant")
    found = {mode: learned(run(*sets, f"tokenize.thoughts={mode}"))[0] for mode in ("train", "mask", "drop")}
    assert found["train"].startswith(b"<think>hm</think>ww<")
    assert found["mask"].startswith(b"<think></think>ww<")
    assert found["drop"].startswith(b"ww<")


def test_the_ledger_explains_answers_that_are_not_trained(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}, {"messages": [*TALK[:3], {**TALK[3], "content": "vv"}]}])
    run(f"tokenize.chat_template={json.dumps(CHATML)}")
    assert "assistant turns are trained on" not in " ".join(capsys.readouterr().out.split())
    assert (ledger("train")["assistant_turns"], ledger("train")["trained_answers"]) == (4, 4)
    run(f"tokenize.chat_template={json.dumps(CHATML)}", "tokenize.train_on=last_assistant")
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 assistant turns are trained on: 2 before the last, by train_on: last_assistant" in shown
    assert (ledger()["assistant_turns"], ledger()["trained_answers"]) == (4, 2)


@pytest.mark.parametrize(
    ("mode", "rows", "counted"),
    [
        ("truncate", 2, {"truncated": 1}),
        ("drop", 1, {"dropped_too_long": 1}),
        ("split", 4, {"split": 1}),
    ],
)
def test_over_length(raw: Path, mode: str, rows: int, counted: dict[str, int]) -> None:
    lines(raw / "rows.jsonl", [{"text": "short"}, {"text": "a long text: " * 4}])
    table = run("tokenize.max_length=20", "tokenize.overlap=2", f"tokenize.over_length={mode}")
    assert len(table) == rows
    assert max(table["tokens"].to_pylist()) <= 20
    assert {name: ledger()[name] for name in counted} == counted
    assert ledger()["longest"] == 53


def test_over_length_can_be_an_error(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"text": "short"}, {"text": "a long text: " * 4}])
    with pytest.raises(ValueError, match=r"raw/rows.jsonl:2: has 53 tokens; raise tokenize.max_length \(20\)"):
        run("tokenize.max_length=20", "tokenize.overlap=2", "tokenize.over_length=error")
    assert not Path("data/tokens").exists()


def test_overlap_makes_more_windows(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"text": "a long text: " * 4}])
    few, many = (
        len(run("tokenize.max_length=20", f"tokenize.overlap={n}", "tokenize.over_length=split")) for n in (0, 10)
    )
    assert few < many


def test_a_rejected_conversation_is_an_error_or_counted(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}, {"messages": TALK[1:]}])
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    sets = f"tokenize.chat_template={json.dumps(strict)}"
    line = r"raw/rows.jsonl:2: the chat template rejects the turns assistant, user, assistant: user first"
    with pytest.raises(ValueError, match=line):
        run(sets)
    assert len(run(sets, "tokenize.on_bad_row=skip")) == 1
    assert (ledger()["rows_in"], ledger()["rows_used"], ledger()["dropped_bad"]) == (2, 1, 1)


def test_a_row_with_nothing_to_learn_is_counted_and_a_split_of_them_refused(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"messages": TALK}, {"messages": TALK[:1]}])
    sets = f"tokenize.chat_template={json.dumps(CHATML)}"
    run(sets)
    assert ledger()["dropped_nothing_to_learn"] == 1
    lines(raw / "rows.jsonl", [{"messages": TALK[:1]}])
    with pytest.raises(ValueError, match=r"the train split has no row left of 1 \(dropped_nothing_to_learn 1\)"):
        run(sets)


def test_rows_in_are_rows_used_and_dropped(raw: Path) -> None:
    lines(raw / "rows.jsonl", PAIRS)
    run("tokenize.max_length=60", "tokenize.overlap=0", "tokenize.over_length=drop", to_train=False)
    for name in (*SPLITS, "all"):
        figures = ledger(name)
        dropped = sum(count for key, count in figures.items() if key.startswith("dropped_"))
        assert figures["rows_in"] == figures["rows_used"] + dropped
        assert all(isinstance(value, int | float) for value in figures.values())
    assert ledger()["dropped_too_long"] > 0
    assert ledger()["rows_in"] == 120


def test_the_histogram_holds_every_row(raw: Path) -> None:
    lines(raw / "rows.jsonl", PAIRS)
    run(to_train=False)
    with Path("artifacts/plots/lengths.csv").open(encoding="utf-8") as file:
        bins = list(csv.DictReader(file))
    for name in SPLITS:
        assert sum(int(row["rows"]) for row in bins if row["split"] == name) == ledger(name)["rows_in"]


def test_the_table_says_what_max_length_means(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(raw / "rows.jsonl", PAIRS)
    run("tokenize.max_length=80", "tokenize.overlap=0")
    shown = " ".join(capsys.readouterr().out.split())
    assert "max_length 80: " in shown
    assert "of 120 rows are longer" in shown
    assert "would hold them all" in shown


def test_bytes_are_counted_as_fallback(raw: Path) -> None:
    lines(raw / "rows.jsonl", [{"text": "한글"}])
    run()
    assert ledger()["fallback_share"] == pytest.approx(6 / 7, abs=1e-4)
    lines(raw / "rows.jsonl", [{"text": "ascii"}])
    run()
    assert ledger()["fallback_share"] == 0


def test_a_token_without_a_row_in_the_embedding_is_refused(project: Path) -> None:
    fetch()
    prepare()
    manifest = json.loads(Path("artifacts/base.json").read_text(encoding="utf-8"))
    Path("artifacts/base.json").write_text(json.dumps(manifest | {"embedding_rows": 257}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"rows.jsonl:\d+: token 257 has no row in the embedding.*its embedding 257 rows"
    ):
        tokenize()
    assert not Path("data/tokens").exists()
