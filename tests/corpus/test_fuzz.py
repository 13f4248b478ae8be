"""Whatever stands in a file, a reader yields rows and bad rows, and prepare ends with rows or with one line."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.corpus.corpus import write_corpus
from stages.params.schema import Prepare
from stages.readers import find as readers
from stages.readers.rows import BadRow, RawRow

NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"]
OPTIONS = Prepare(
    seed=0, dataset=None, columns={}, template="{question}{answer}", valid_fraction=0.1, valid_rows=None,
    test_fraction=0.1, test_rows=None, group_by=None,
        carry=[], normalize="NFC", duplicates="normalized", leaks="drop",
    near_duplicates=None, max_chars=None, preferences="chosen", labels="drop_false", on_bad_row="skip",
)  # fmt: skip

pieces = st.sampled_from(
    [
        b'{"question": "', b'", "answer": "a"}', b"\n", b"\r\n", b"[", b"]", b"{", b"}", b",", b'"', b"\t", b"text",
        b'{"text": "t"}\n', b'{"messages": [{"role": "user", "content": "x"}]}\n', b"question,answer\nq,a\n",
        b"\xff", b"\x00", b"\\ud800", b"\xef\xbb\xbf", b"1e999", b'{"a": ' * 50, b"null",
        b"NaN", b"PAR1", b"ARROW1\x00\x00", b"\xff\xff\xff\xff",
    ]
)  # fmt: skip
data = st.one_of(st.binary(max_size=200), st.lists(pieces, max_size=12).map(b"".join))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), data, st.booleans())
def test_no_bytes_break_a_reader(name: str, content: bytes, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(gzip.compress(content) if packed and name.endswith(".gz") else content)
        [source], _ = readers.find([path])
        found = list(source.rows())
        assert found
        assert all(isinstance(row, RawRow | BadRow) and row.place.startswith(str(path)) for row in found)
        assert all("\n" not in str(row) for row in found if isinstance(row, BadRow))
        try:
            write_corpus(Path(folder) / "out", [source], OPTIONS, lambda count: None)
        except ValueError as error:
            assert "split got none" in str(error)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
turn_keys = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function_call", "function", "name", "arguments", "type", "text"]
)
words = st.sampled_from(["user", "gpt", "assistant", "function_call", "text", "f", '{"name": "f"}', "[]"])
inner = st.dictionaries(turn_keys, scalars | words, max_size=3)
turns = st.dictionaries(turn_keys, scalars | words | inner | st.lists(inner | scalars, max_size=2), max_size=4)
json_values = scalars | st.lists(scalars | turns | st.lists(turns, max_size=2), max_size=3) | turns
columns = st.sampled_from(
    ["text", "prompt", "completion", "question", "answer", "messages", "conversations", "tools", "system", "history",
     "chosen", "rejected", "chosen_messages", "preferred_output", "input", "label", "images", "instruction", "output"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(columns, json_values, max_size=4), min_size=1, max_size=4),
    st.sampled_from(["{question}{answer}", "{prompt}{completion}", None]),
)
def test_no_values_break_prepare(rows: list[dict[str, object]], template: str | None) -> None:
    options = OPTIONS.model_copy(update={"template": template})
    with tempfile.TemporaryDirectory() as folder:
        read = [RawRow(f"rows:{i}", row) for i, row in enumerate(rows, start=1)]
        source = readers.Source("rows", None, 0, lambda advance: iter(read))
        try:
            report = write_corpus(Path(folder) / "out", [source], options, lambda count: None)
        except ValueError as error:
            assert "split got none" in str(error)
        else:
            assert report.ledger.figures("all")["rows_in"] == len(rows)


def test_a_row_longer_than_any_chunk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.readers import jsonl

    monkeypatch.setattr(jsonl, "_CHUNK", 7)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "' + "물" * 500 + '"},\n {"text": "\\\\\\"]},"}, {"n": -1.5e3}]', encoding="utf-8")
    [source], _ = readers.find([path])
    rows = [row for row in source.rows() if isinstance(row, RawRow)]
    assert [row.fields for row in rows] == [{"text": "물" * 500}, {"text": '\\"]},'}, {"n": -1500.0}]
    assert [row.place.rsplit(":", 1)[1] for row in rows] == ["1", "2", "2"]
