"""Control tokens that a text spells: they are told apart from those that a chat template writes.

A control token is one that the tokenizer calls special, such as <|im_end|>. In a row's strings each is hidden: its
first character becomes a private-use character of its own. A chat template's own tokens are thus the only ones that a
rendered text spells out. To encode such a text, a copy of the tokenizer is used whose control tokens go by the hidden
names: the template's own are renamed, what the row spells is ordinary text. Lengths in characters stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

_FIRST = 0xF0000  # of the private-use characters of plane 15


class ControlTokens:
    """A tokenizer's control tokens; `backend` is what it encodes with."""

    def __init__(self, tokenizer: Any, backend: Any) -> None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._hidden = {name: chr(_FIRST + i) + name[1:] for i, name in enumerate(sorted(filter(None, special)))}
        self._shown = {hidden: name for name, hidden in self._hidden.items()}
        self.pattern = _any_of(self._hidden)
        self._hidden_pattern = _any_of(self._shown)
        self._private = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + max(len(self._hidden) - 1, 0))}]")
        self._backend = backend

    def spelled(self, value: Any) -> str | None:
        """The first control token that a string spells, or a string anywhere in a list or an object."""
        for text in _strings(value):
            if found := self.pattern.search(text):
                return found.group()
        return None

    def hide(self, value: Any) -> Any:
        """The value with every control token hidden in its strings.

        Raises:
            ValueError: a string has a character that stands for a control token.
        """
        if isinstance(value, str):
            if self._private.search(value):
                raise ValueError(
                    "has a private-use character (U+F0000 and on) beside the name of a control token; remove it"
                )
            return self.pattern.sub(lambda match: self._hidden[match.group()], value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return value

    def show(self, text: str) -> str:
        """The text with its hidden control tokens spelled out."""
        return self._hidden_pattern.sub(lambda match: self._shown[match.group()], text)

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        """The encoding of a text in which some control tokens are hidden: those become ordinary tokens.

        Raises:
            ValueError: the tokenizer makes a control token of ordinary text.
        """
        swapped = {**self._hidden, **self._shown}
        renamed = _any_of(swapped).sub(lambda match: swapped[match.group()], text)
        encoding = self._renamed.encode(renamed, add_special_tokens=add_special_tokens)
        ids = (i for i, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not added)
        # A character that the vocabulary lacks becomes the unknown token, whatever the text spells.
        made = self.count(i for i in ids if i != self._unknown)
        if made != len([name for name in self._hidden_pattern.findall(renamed) if self._id(name) != self._unknown]):
            raise ValueError(
                "spells a control token that this tokenizer cannot write as text; correct the row, or set "
                "tokenize.special_in_content: allow"
            )
        return encoding

    def count(self, ids: Iterable[int]) -> int:
        """Count the control tokens among the ids."""
        return sum(index in self._ids for index in ids)

    def _id(self, hidden: str) -> int | None:
        """The id of a control token by its hidden name."""
        found: int | None = self._backend.token_to_id(self._shown[hidden])
        return found

    @cached_property
    def _unknown(self) -> int | None:
        """The id that the tokenizer's model gives to what its vocabulary lacks."""
        model = json.loads(self._backend.to_str())["model"]
        name, index = model.get("unk_token"), model.get("unk_id")
        return self._backend.token_to_id(name) if name else index

    @cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(self._backend.token_to_id(name) for name in self._hidden)

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer with its control tokens under their hidden names, ids as they were."""
        import tokenizers

        state = json.loads(self._backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._hidden.get(token["content"], token["content"])
        model = state["model"]
        # What merges make of ordinary text keeps its name: `encode` finds it.
        merged = {"".join(pair) for pair in model.get("merges") or () if isinstance(pair, list)}
        names = {name: hidden for name, hidden in self._hidden.items() if name not in merged}
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(state))


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the names, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
