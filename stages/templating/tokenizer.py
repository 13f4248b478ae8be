"""A base model's tokenizer, as rows and prompts are encoded with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.templating.control import ControlTokens


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The model directory's tokenizer, in its fast form, which knows character offsets.

    Raises:
        ValueError: there is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {directory.name} has no fast form (tokenizer.json), which offsets need")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {directory.name} names no EOS token, without which generation never stops")
    return tokenizer


class TextTokenizer:
    """A fast tokenizer's own backend, with exact character offsets, and what it adds around a text.

    `prefix` and `suffix` count the tokens that it puts before and behind a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = exact_backend(tokenizer)
        added = self.backend.encode("a").special_tokens_mask
        self.prefix, self.suffix = added.index(0), added[::-1].index(0)
        self.eos: int = tokenizer.eos_token_id
        self.control = ControlTokens(tokenizer, self.backend)
        self._bos: str | None = tokenizer.bos_token
        self._eos_text = str(tokenizer.eos_token)

    def adds_bos(self, text: str) -> bool:
        """True if BOS goes before a text: one that brings its own gets no second."""
        return not (self._bos and text.startswith(self._bos))

    def hide_control(self, text: str) -> str:
        """A text that no chat template made with its control tokens hidden, but for its own BOS and EOS at its ends."""
        start = len(self._bos) if self._bos and text.startswith(self._bos) else 0
        end = len(text) - len(self._eos_text) if text.endswith(self._eos_text) else len(text)
        return text if end < start else text[:start] + str(self.control.hide(text[start:end])) + text[end:]

    def encode(self, text: str, *, hidden: bool, add_special_tokens: bool) -> Any:
        """The encoding of a text; `hidden`: control tokens are hidden in it.

        Raises:
            ValueError: one of those cannot be written as ordinary tokens.
        """
        encode = self.control.encode if hidden else self.backend.encode
        return encode(text, add_special_tokens=add_special_tokens)

    def prompt_ids(self, text: str, *, rendered: bool, hidden: bool) -> list[int]:
        """The tokens of a prompt as training has them at a row's start: BOS once, no EOS.

        Where a chat template `rendered` the text, it wrote BOS too. `hidden`: control tokens are hidden in the text.
        """
        special = not rendered and self.adds_bos(text)
        ids = list(self.encode(text, hidden=hidden, add_special_tokens=special).ids)
        return ids[: len(ids) - self.suffix] if special else ids


def exact_backend(tokenizer: Any) -> Any:
    """A fast tokenizer's own, without truncation and padding, and with offsets that white space is not trimmed from."""
    import tokenizers

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    pending = [state["post_processor"]]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if "trim_offsets" in node:
                node["trim_offsets"] = False
            pending += node.get("processors", [])
    return tokenizers.Tokenizer.from_str(json.dumps(state))
