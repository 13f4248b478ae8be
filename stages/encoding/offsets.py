"""The places of tokens in a text, in characters and in bytes.

Any fast tokenizer tells its tokens' offsets. A byte-level one need not be asked: its tokens' bytes, one after another,
are the text's bytes, so lengths add up to positions. That is exact, and spares the tokenizer a third of its work; a row
where the sum is not the text's length (a normaliser, a token that swallows white space) gets its offsets after all.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

# Text that a tokenizer must reproduce byte by byte before its lengths are trusted.
_SAMPLE = " a  b\n\nC1 23 안녕 é\t"


def first_token(encoding: Any, char: int, text: str) -> int:
    """The first token that reaches beyond the place `char`."""
    if char >= len(text):
        return len(encoding)
    token = encoding.char_to_token(char)
    if token is not None:
        return int(token)
    return next((i for i, (_, end) in enumerate(encoding.offsets) if end > char), len(encoding))


def end_token(encoding: Any, char: int, text: str) -> int:
    """One past the last token that begins before the place `char`."""
    if char >= len(text):
        end = len(encoding)
        while end and encoding.token_to_chars(end - 1) is None:  # special tokens that the tokenizer added
            end -= 1
        return end
    token = encoding.char_to_token(char)
    if token is not None:
        return int(token) + int(encoding.token_to_chars(token)[0] < char)
    return next((i for i, (begin, _) in enumerate(encoding.offsets) if begin >= char), len(encoding))


def place(encoding: Any, token: int, edge: int, otherwise: int) -> int:
    """The start (edge 0) or the end (1) of a token's characters; `otherwise` for an appended EOS."""
    chars = encoding.token_to_chars(token) if token < len(encoding) else None
    return int(chars[edge]) if chars else otherwise


def byte_lengths(backend: Any) -> np.ndarray | None:
    """Of each token id of a byte-level tokenizer, how many bytes of text it stands for; None for other tokenizers."""
    symbols = byte_alphabet()
    table = np.zeros(max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1, dtype=np.int64)
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        table[index] = sum(symbol in symbols for symbol in token)
    for index, token in backend.get_added_tokens_decoder().items():
        table[index] = len(token.content.encode())
    ids = backend.encode(_SAMPLE, add_special_tokens=False).ids
    return table if int(table[ids].sum()) == len(_SAMPLE.encode()) and is_byte_level(backend) else None


def is_byte_level(backend: Any) -> bool:
    """True if a tokenizer's vocabulary spells bytes in symbols, as GPT-2's does."""
    state = json.loads(backend.to_str())
    return "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def byte_alphabet() -> dict[str, int]:
    """Symbol → byte of byte-level vocabularies. Source: `bytes_to_unicode` of GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def size(text: str, end: int | None = None) -> int:
    """UTF-8 bytes of a text, or of its first `end` characters."""
    part = text if end is None or end >= len(text) else text[:end]
    return len(part) if part.isascii() else len(part.encode())
