"""JSON Lines and JSON arrays → raw rows, as a stream. A null stays a null.

Source: jsonlines.org; RFC 8259.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.readers.json_text import DECODER, DuplicateKeyError, decode
from stages.readers.rows import (
    BYTE_ORDER_MARK,
    SECOND_FILE,
    Advance,
    BadRow,
    RawRow,
    broken_stream,
    not_utf8,
    nothing,
    open_bytes,
    read_lines,
)

_CHUNK = 1 << 20
_EXAMPLE = '{"question": "…", "answer": "…"}'


def read_jsonl(path: Path, advance: Advance = nothing) -> Iterator[RawRow | BadRow]:
    """The rows of a file with one JSON object a line; blank lines are passed over."""
    for line in read_lines(path, advance):
        if isinstance(line, BadRow):
            yield line
        elif line[1].strip():
            yield parse(line[1], f"{path}:{line[0]}")


def parse(text: str, place: str) -> RawRow | BadRow:
    """One JSON object as a row."""
    if text.startswith(BYTE_ORDER_MARK):
        return BadRow(place, SECOND_FILE)
    try:
        fields = decode(text)
    except DuplicateKeyError as error:
        return BadRow(place, str(error))
    except (ValueError, RecursionError) as error:
        return BadRow(place, f"not valid JSON ({_what(error)}); each line must hold one object")
    if not isinstance(fields, dict):
        return BadRow(place, f"must be an object such as {_EXAMPLE}, not {_kind(fields)}")
    return RawRow(place, fields)


def read_json(path: Path, advance: Advance = nothing) -> Iterator[RawRow | BadRow]:
    """The rows of a file that is one JSON array of objects, or in truth JSON Lines."""
    with open_bytes(path) as file:
        try:
            start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
        except OSError as error:
            yield BadRow(f"{path}:1", broken_stream(error))
            return
    if start.startswith(b"["):
        yield from _Array(path, advance).rows()
    else:
        yield from read_jsonl(path, advance)


class _Array:
    """A JSON array read chunk by chunk: `text` is what has been read and not yet parsed, from `line` on."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self.path, self.advance = path, advance
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def rows(self) -> Iterator[RawRow | BadRow]:
        try:
            with open_bytes(self.path, self.advance) as file:
                self.chunks = _decoded(file)
                yield from self._elements()
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            start = error.object.rfind(b"\n", 0, error.start) + 1
            yield BadRow(f"{self.path}:{line}", not_utf8(error.object[start:], error.start - start))
        except OSError as error:
            yield BadRow(self._place(), broken_stream(error))

    def _elements(self) -> Iterator[RawRow | BadRow]:
        self._next_mark()
        self._step(1)  # the bracket that opens
        if self._next_mark() == "]":
            self._step(1)
        else:
            while True:
                place = self._place()
                try:
                    row = self._element(place)
                except UnicodeDecodeError:
                    raise
                except (ValueError, RecursionError) as error:
                    if isinstance(error, json.JSONDecodeError):
                        place = f"{self.path}:{self.line + self.text.count(chr(10), self.at, error.pos)}"
                    yield BadRow(place, f"not valid JSON ({_what(error)}); the file must be an array of objects")
                    return
                yield row
                mark = self._next_mark()
                self._step(len(mark))
                if mark == "]":
                    break
                if mark != ",":
                    found = repr(mark) if mark else "the file's end"
                    yield BadRow(self._place(), f"not valid JSON ({found} where , or ] must be); correct the array")
                    return
                self._next_mark()
        if mark := self._next_mark():
            yield BadRow(self._place(), f"{mark!r} after the array's end; a file holds one array")

    def _element(self, place: str) -> RawRow | BadRow:
        try:
            value = self._value()
        except DuplicateKeyError as error:
            self._value(json.JSONDecoder())  # the array goes on behind it
            return BadRow(place, str(error))
        if not isinstance(value, dict):
            return BadRow(place, f"must be an object such as {_EXAMPLE}, not {_kind(value)}")
        return RawRow(place, value)

    def _value(self, decoder: json.JSONDecoder = DECODER) -> Any:
        """Parse the value that starts here, reading on until it is whole."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if not (unfinished and self._more()):
                    raise
            else:
                # A number at the end of what was read may go on; an object may not.
                if end == len(self.text) and not isinstance(value, dict) and self._more():
                    continue
                self._step(end - self.at)
                return value

    def _next_mark(self) -> str:
        """The next character that is not white space, not consumed; "" at the end of the file."""
        while True:
            rest = self.at
            while rest < len(self.text) and self.text[rest] in " \t\r\n":
                rest += 1
            self._step(rest - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _step(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def _more(self) -> bool:
        """Read at least as much again as is pending, so that a long value costs time in proportion to its length."""
        pending, read = [self.text[self.at :]], 0
        while read < max(len(pending[0]), 1):
            chunk = next(self.chunks, "")
            if not chunk:
                break
            pending.append(chunk)
            read += len(chunk)
        self.text, self.at = "".join(pending), 0
        return read > 0

    def _place(self) -> str:
        return f"{self.path}:{self.line}"


def _decoded(file: Any) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := file.read(_CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _what(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number too long"


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
