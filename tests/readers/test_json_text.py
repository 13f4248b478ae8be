"""JSON: a null is a null, and no object has a key twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.readers import jsonl
from stages.readers.json_text import DuplicateKeyError, decode
from stages.readers.rows import BadRow, RawRow


def test_a_value_is_read_as_it_stands() -> None:
    assert decode('{"a": {"b": null, "c": [1, {"b": 2}]}, "b": 3}') == {"a": {"b": None, "c": [1, {"b": 2}]}, "b": 3}


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[{"x": {"a": 1, "a": 2}}]', '{"a": 1, "\\u0061": 2}'])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(DuplicateKeyError, match="the key 'a' stands twice in one object; keep one of the two"):
        decode(text)


def test_an_array_goes_on_behind_a_key_that_stands_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK", 5)
    path = tmp_path / "a.json"
    path.write_text('[{"n": 1},\n {"n": 1, "n": 2, "m": {"n": 3}},\n {"n": 4}]', encoding="utf-8")
    [first, bad, last] = jsonl.read_json(path)
    assert isinstance(bad, BadRow) and bad.place == f"{path}:2"
    assert [row.fields for row in (first, last) if isinstance(row, RawRow)] == [{"n": 1}, {"n": 4}]


def test_a_bad_byte_far_into_an_array_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK", 5)
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"n": 1},\n {"n": "abcdef\xff"}]')
    [_, bad] = jsonl.read_json(path)
    assert "is not UTF-8; save the file as UTF-8" in str(bad)
