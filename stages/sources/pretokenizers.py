"""The pre-tokenizers of byte-level BPE that llama.cpp knows by a name, and what a tokenizer.json holds for each.

Source: llama.cpp's `tokenizer.ggml.pre`, and the tokenizer.json of the models that brought each in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"  # each digit apart, then GPT-2's words
_GPT2 = "gpt2"  # GPT-2's words, which the tokenizers library has built in


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer by llama.cpp's name: how it splits text; `ignore_merges`: a word that is a token needs none."""

    name: str
    pattern: str
    ignore_merges: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """Its steps as a tokenizer.json has them."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        if self.pattern == _GPT2:
            return [level]
        if self.pattern == _DIGITS:
            return [{"type": "Digits", "individual_digits": True}, level]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return [split, level | {"use_regex": False}]


# Two of the same pattern differ in what they do with merges: `dbrx` has Llama 3's words, and always merges.
PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", _GPT2),
    PreTokenizer("smollm", _DIGITS),
    PreTokenizer("llama-bpe", _LLAMA3, ignore_merges=True),
    PreTokenizer("dbrx", _LLAMA3),
    PreTokenizer("qwen2", _QWEN2),
    PreTokenizer("gpt-4o", _GPT4O),
    PreTokenizer("tekken", _TEKKEN, ignore_merges=True),
)


def by_name(name: object) -> PreTokenizer | None:
    """The pre-tokenizer that `tokenizer.ggml.pre` names, if it is known here."""
    return next((each for each in PRE_TOKENIZERS if each.name == name), None)


def by_steps(steps: Sequence[dict[str, Any]], *, ignore_merges: bool) -> PreTokenizer | None:
    """The pre-tokenizer that a tokenizer.json's steps are, if llama.cpp has a name for it."""
    wanted = [_essence(step) for step in steps]
    for each in PRE_TOKENIZERS:
        if [_essence(step) for step in each.steps()] == wanted and each.ignore_merges == ignore_merges:
            return each
    return None


def _essence(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what changes no token."""
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    pattern = step.get("pattern")
    return step | {"pattern": pattern["Regex"]} if isinstance(pattern, dict) and "Regex" in pattern else step
