"""Text of the user's own → text that a page can show, whatever is in it."""

from __future__ import annotations

import re

# Control characters, and those that embed, override or isolate a writing direction.
_UNSEEN = (
    *range(0x09),
    0x0B,
    0x0C,
    *range(0x0D, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
_HALVES = range(0xD800, 0xE000)
_SHOWN = {code: f"[U+{code:04X}]" for code in _UNSEEN} | dict.fromkeys(_HALVES, "�")

# In the order in which they are asked: Japanese has Han characters too.
_SCRIPTS = {
    "ko": re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
}
_CODE = re.compile(r"```|^(?: {2,}|\t+)\S", re.MULTILINE)


def visible(text: str) -> str:
    """The text with its control characters written out, as `[U+0000]`, line ends and tabs apart.

    Half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD.
    """
    return text.replace("\r\n", "\n").translate(_SHOWN)


def language(text: str) -> str:
    """The language tag for a text's script, so that a browser chooses the font for it; empty for other scripts."""
    return next((tag for tag, letters in _SCRIPTS.items() if letters.search(text)), "")


def is_code(text: str) -> bool:
    """True if a text has indented lines or a fence, and reads best in letters of one width."""
    return bool(_CODE.search(text))
