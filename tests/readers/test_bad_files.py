"""Every kind of bad input, and the one line that it gets."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.prepare import prepare
from tests.support.imports import ROOT

GOOD = '{"question": "q", "answer": "a"}\n'
PAIR = {"question": "q", "answer": "a"}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def chat(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)}) + "\n"


def row(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def call(arguments: str) -> dict[str, Any]:
    return {**BOT, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "b"}

# name of the file: its content, and what the line says; {} stands for the file
BAD: list[tuple[str, str | bytes, str]] = [
    # JSON Lines
    ("a.jsonl", "", "{}:1: holds no rows; add some"),
    ("a.jsonl", "\n \n", "{}:1: holds no rows; add some"),
    ("a.jsonl", GOOD + "{", "{}:2: not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    ("a.jsonl", GOOD + "\n" + '{"question": "q"', "{}:3: not valid JSON (Expecting ',' delimiter at column 17)"),
    ("a.jsonl", GOOD + "nonsense\n", "{}:2: not valid JSON (Expecting value at column 1)"),
    ("a.jsonl", GOOD + "[1]\n", '{}:2: must be an object such as {"question": "…", "answer": "…"}, not an array'),
    ("a.jsonl", GOOD + '"text"\n', "{}:2: must be an object such as"),
    ("a.jsonl", GOOD + "null\n", "{}:2: must be an object such as"),
    ("a.jsonl", GOOD + "[" * 100_000 + "\n", "{}:2: not valid JSON (nested too deep)"),
    ("a.jsonl", GOOD + '{"n": ' + "9" * 5000 + "}\n", "{}:2: not valid JSON (a number too long)"),
    ("a.jsonl", GOOD + '{"question": "q"}\n', "{}:2: has no 'answer' (it has: question); correct the row"),
    ("a.jsonl", GOOD + '{"question": "q", "answer": 3}\n', "{}:2: 'answer' must be text, not int"),
    ("a.jsonl", GOOD + '{"question": null, "answer": "a"}\n', "{}:2: 'question' must be text, not null"),
    ("a.jsonl", GOOD + '{"question": "q", "answer": ["a"]}\n', "{}:2: 'answer' must be text, not list"),
    ("a.jsonl", GOOD + '{"question": "\\ud800", "answer": "a"}\n', "{}:2: holds half of a surrogate pair"),
    ("a.jsonl", GOOD + chat(USER, BOT), "{}:2: mixed schemas: this row is messages, the first one question+answer"),
    ("a.jsonl", '{"text": "t"}\n' + GOOD, "{}:2: mixed schemas: this row is question+answer, the first one text"),
    ("a.jsonl", '{"frage": "q"}\n', "{}:1: no known columns (it has: frage; wanted: messages; conversations; "),
    ("a.jsonl", '{"a\\nb": "q"}\n', "{}:1: no known columns (it has: 'a\\nb'; wanted"),
    ("a.jsonl", GOOD.encode() + b'{"question": "\xff"}\n', "{}:2: byte 15 (0xff) is not UTF-8; save the file as UTF-8"),
    ("a.jsonl", GOOD + "\ufeff" + GOOD, "{}:2: a byte-order mark: a second file begins here; part the two"),
    (
        "a.jsonl",
        GOOD + '{"question": "q", "answer": "a", "question": "r"}\n',
        "{}:2: the key 'question' stands twice in",
    ),
    ("a.jsonl", GOOD + row(**PAIR, meta={}).replace("{}", '{"a": 1, "a": 2}'), "{}:2: the key 'a' stands twice in one"),
    ("a.jsonl", GOOD.encode("utf-16"), "{}:1: this is UTF-16 (byte 1); save the file as UTF-8"),
    ("a.jsonl", '{"question": "물", "answer": "a"}\n'.encode("cp949"), "{}:1: byte 15 (0xb9) is not UTF-8"),
    # Compressed
    ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-12], "{}:1: the compressed stream is broken here"),
    ("a.jsonl.gz", GOOD, "{}:1: the compressed stream is broken here"),
    ("a.jsonl.gz", gzip.compress(b""), "{}:1: holds no rows; add some"),
    ("a.jsonl.zst", b"no zstd at all", "{}:1: the compressed stream is broken here"),
    ("a.csv.gz", gzip.compress(b"question,answer\nq,a\n")[:-9], ":1: the compressed stream is broken here"),
    # JSON arrays
    ("a.json", "[]", "{}:1: holds no rows; add some"),
    ("a.json", f"[{GOOD}", "{}:2: not valid JSON (the file's end where , or ] must be); correct the array"),
    ("a.json", f"[{GOOD}{GOOD}]", "{}:2: not valid JSON ('{' where , or ] must be); correct the array"),
    ("a.json", f"[{GOOD}, 3]", "{}:2: must be an object such as"),
    ("a.json", f"[{GOOD}]\n]", "{}:3: ']' after the array's end; a file holds one array"),
    ("a.json", f"[{GOOD},\n{{'question'}}]", "{}:3: not valid JSON"),
    ("a.json", f'[{GOOD},{{"answer": "a", "answer": "b"}}]', "{}:2: the key 'answer' stands twice in one object; keep"),
    ("a.json", '{\n "data": []\n}', "{}:1: not valid JSON"),
    ("a.json", b'[{"question": "\xff"}]', "{}:1: byte 16 (0xff) is not UTF-8; save the file as UTF-8"),
    # CSV and TSV
    ("a.csv", "", "{}:1: holds no rows; add some"),
    ("a.csv", "question,answer\n", "{}:1: holds no rows; add some"),
    ("a.csv", "question,answer\nq\n", "{}:2: 1 cells where the header has 2; quote cells that hold the delimiter"),
    ("a.csv", "question,answer\n\n\nq,a,b\n", "{}:4: 3 cells where the header has 2"),
    ("a.csv", 'question,answer\n"q,a\n', "{}:2: not valid CSV (unexpected end of data); quote the cell"),
    ("a.csv", 'question,answer\n"x\ny",a\n"q"b,a\n', "{}:4: not valid CSV (',' expected after '\"')"),
    ("a.csv", "question;answer\nq;a\n", "{}:1: the cells are parted by semicolons; save the file with commas"),
    ("a.csv", "question,\nq,a\n", "{}:1: column 2 has no name; the first line must name the columns"),
    ("a.csv", "answer,answer\nq,a\n", "{}:1: two columns are called 'answer'; rename one"),
    ("a.csv", b"question,answer\nq,\xe9\n", "{}:2: byte 3 (0xe9) is not UTF-8; save the file as UTF-8"),
    ("a.csv", 'question,answer\nq, "a"\n', "{}:2: a blank stands between a delimiter and a quote; remove it, or quote"),
    ("a.csv", "question,answer\nq,a\nquestion,answer\n", "{}:3: the header stands here again: a second file begins;"),
    ("a.csv", "question,answer\nq,a\n\ufeffquestion,answer\n", "{}:3: a byte-order mark: a second file begins here;"),
    ("a.csv", 'messages\n"[{""role"": 1, ""role"": 2}]"\n', "{}:2: 'messages': the key 'role' stands twice in one"),
    ("a.tsv", 'question\tanswer\nq\t "a"\n', "{}:2: a blank stands between a delimiter and a quote; remove it"),
    ("a.tsv", "question\tanswer\nq\n", "{}:2: 1 cells where the header has 2"),
    # Parquet and Arrow
    ("a.parquet", b"PAR1 and then nothing", "{}:1: not a readable Parquet file ("),
    ("a.parquet", parquet([PAIR])[:-20], "{}:1: not a readable Parquet file ("),
    ("a.parquet", parquet([{"question": "q"}]), "{}:1: no known columns (it has: question; wanted"),
    ("a.parquet", parquet([PAIR, {"question": "q", "answer": None}]), "{}:2: 'answer' must be text, not null"),
    ("a.parquet", parquet([{"question": 1, "answer": 2}]), "{}:1: 'question' must be text, not int"),
    ("a.arrow", b"no arrow", "{}:1: cannot be read on (File is too small"),
    ("a.arrow", arrow([PAIR])[:-60], "{}:1: "),
    ("state.json", "{}", "state.json: does not name the dataset's files; save the dataset anew"),
    ("state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "state.json: names x.arrow, which is not there"),
    # Conversations
    ("a.jsonl", chat(BOT, "hello"), "{}:1: turn 2 must be an object such as"),
    ("a.jsonl", chat(USER, {"content": "x"}), "{}:1: turn 2 has no 'role'; name who speaks, such as user or assistant"),
    ("a.jsonl", chat({"role": "oracle", "content": "x"}), "{}:1: turn 1 has the unknown role 'oracle'; known: system"),
    (
        "a.jsonl",
        chat(USER, {"role": "assistant"}),
        "{}:1: turn 2 (assistant) has no 'content' (it has: role); give it one",
    ),
    ("a.jsonl", chat({"role": "user", "content": {}}), "{}:1: turn 1 (user): 'content' must be text, not dict"),
    ("a.jsonl", chat({"role": "user", "content": [1]}), "{}:1: turn 1 (user): part 1 of 'content' must be text, as"),
    (
        "a.jsonl",
        chat({"role": "user", "content": [{"type": "image_url"}]}),
        "part 1 of 'content' is of type 'image_url'",
    ),
    ("a.jsonl", chat({**USER, "tool_calls": [1]}), "{}:1: turn 1 (user) has 'tool_calls'; only an assistant's turn"),
    (
        "a.jsonl",
        chat(USER, {**BOT, "weight": 0.5}),
        "{}:1: turn 2 (assistant): 'weight' is 0.5; a turn is learned or not",
    ),
    (
        "a.jsonl",
        chat(USER, {**BOT, "tool_calls": [1]}),
        "{}:1: turn 2 (assistant): 'tool_calls', call 1 must be an obj",
    ),
    ("a.jsonl", chat(USER, call("{'a': 1}")), "call 1: 'arguments' is text, but not JSON; it must be an object"),
    ("a.jsonl", chat(USER, call("[1]")), "call 1: 'arguments' must be an object, not list; correct the call"),
    (
        "a.jsonl",
        chat(USER, call('{"a": 1, "a": 2}')),
        "call 1: 'arguments': the key 'a' stands twice in one object; keep",
    ),
    (
        "a.jsonl",
        chat(USER, {"role": "function_call", "content": "f()"}),
        "is text, but not JSON; it must be a call such as",
    ),
    ("a.jsonl", chat(USER, {**BOT, "thinking": 1}), "{}:1: turn 2 (assistant): 'thinking' must be text, not int"),
    ("a.jsonl", row(messages=[USER, BOT], system=1), "{}:1: 'system' must be text, not int"),
    (
        "a.jsonl",
        row(messages=[{"role": "system", "content": "s"}, USER, BOT], system="t"),
        "{}:1: its 'system' and the system turn say different things; keep one of them",
    ),
    (
        "a.jsonl",
        row(messages=[USER, BOT], tools=[{"name": "f", "parameters": 1}]),
        "tool 1: 'parameters' must be an obj",
    ),
    ("a.jsonl", '{"messages": {}}\n', "{}:1: 'messages' must be a list of turns, not dict"),
    ("a.jsonl", '{"conversations": "hi"}\n', "{}:1: 'conversations' is text, but not JSON; it must be a list"),
    (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "u"}], "tools": [1]}',
        "{}:1: 'tools' must be a list of obje",
    ),
    # What stands beside the text
    ("a.jsonl", row(**PAIR, history=[["q", "a"]]), "{}:1: has history, which prepare.template leaves out; set prepare"),
    (
        "a.jsonl",
        row(**PAIR, system="s"),
        "{}:1: has system, which prepare.template leaves out; set prepare.template: null",
    ),
    ("a.jsonl", row(**PAIR, images=["a.png"]), "{}:1: holds images; only text is trained here: remove the column"),
    ("a.jsonl", row(caption="c", image="a.png"), "{}:1: holds image; only text is trained here: remove the column"),
    ("a.jsonl", row(question="<image>", answer="a", images=[]), "{}:1: has <image> in its text; only text is trained"),
    (
        "a.jsonl",
        row(prompt="q", chosen="a", rejected="b"),
        "{}:1: is a preference pair (chosen, rejected); set prepare",
    ),
    ("a.jsonl", row(messages=[USER], chosen=BOT, rejected=BOT), "{}:1: is a preference pair (chosen, rejected); set"),
    (
        "a.jsonl",
        row(prompt="q", completion="a", label=False),
        "{}:1: its 'label' says whether the answer is wanted; set",
    ),
    # Files
    ("a.xlsx", "", "a.xlsx: not a kind of file that is known here; bring .jsonl, .json, .csv"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if name == "state.json":
        Path("set").mkdir()
        path.rename("set/state.json")
        Path("set/dataset_info.json").write_text("{}", encoding="utf-8")
        return Path("set")
    return path


@pytest.mark.parametrize(("name", "content", "line"), BAD, ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)])
def test_bad_input_gets_one_line_and_nothing_is_written(
    folder: Path, name: str, content: str | bytes, line: str
) -> None:
    path = write(name, content)
    before = {file for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError) as raised:
        prepare([path])
    message = str(raised.value)
    assert line.replace("{}", name, 1) in message
    assert "\n" not in message
    assert ";" in message or " must " in message  # what to do
    assert {file for file in folder.rglob("*") if file.is_file()} == before


SKIPPABLE = [row for row in BAD if row[0] == "a.jsonl" and row[1][: len(GOOD)] == GOOD]


@pytest.mark.parametrize(("name", "content"), [row[:2] for row in SKIPPABLE])
def test_a_bad_row_can_be_skipped_and_is_counted(folder: Path, name: str, content: str) -> None:
    write(name, content)
    prepare([Path(name)], overrides=["prepare.on_bad_row=skip", *ALL_TO_TRAIN])
    ledger = json.loads(Path("artifacts/details/prepare.json").read_text(encoding="utf-8"))["all"]
    assert (ledger["rows_in"], ledger["rows_used"], ledger["dropped_bad"]) == (2, 1, 1)


def test_a_broken_stream_can_be_skipped_and_is_counted(folder: Path) -> None:
    noise = random.Random(0)  # noqa: S311
    rows = "".join(f'{{"text": "{noise.random()}"}}\n' for _ in range(20_000)).encode()
    Path("a.jsonl.gz").write_bytes(gzip.compress(rows)[:-2000])
    prepare([Path("a.jsonl.gz")], overrides=["prepare.on_bad_row=skip"])
    ledger = json.loads(Path("artifacts/details/prepare.json").read_text(encoding="utf-8"))["all"]
    assert ledger["dropped_bad"] == 1
    assert 0 < ledger["rows_used"] < 20_000


ALL_TO_TRAIN = ["prepare.valid_fraction=0.0", "prepare.test_fraction=0.0"]

EMPTY: list[tuple[list[str], str]] = [
    ([], "the valid split got none of the 1 rows; add rows or raise prepare.valid_fraction"),
    (
        ["prepare.valid_fraction=null", "prepare.valid_rows=5"],
        "5 rows for valid and some to train on need more than the 1 there are; lower prepare.valid_rows",
    ),
    (
        [*ALL_TO_TRAIN, "prepare.max_chars=3"],
        "the train split got none of the 0 rows: all 1 were dropped (1 too_long); correct the rows, or the parameters",
    ),
    (
        [*ALL_TO_TRAIN, "prepare.on_bad_row=skip", "prepare.columns={text: body}"],
        "the train split got none of the 0 rows: all 1 were dropped (1 bad); the first bad one is a.jsonl:1: has no",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), EMPTY)
def test_an_empty_split_is_an_error(folder: Path, overrides: list[str], line: str) -> None:
    Path("a.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        prepare([Path("a.jsonl")], overrides=overrides)
    assert line in str(raised.value)
    assert not Path("data").exists() or not list(Path("data").iterdir())


def test_there_are_at_least_forty() -> None:
    assert len(BAD) >= 40
