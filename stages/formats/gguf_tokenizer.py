"""A model directory's tokenizer → the keys of GGUF that llama.cpp tokenises by.

Two kinds have a form there: byte-level BPE (`gpt2`), and BPE made of a SentencePiece model, with byte fallback
(`llama`). Source: the GGUF specification; llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files.outputs import read_json
from stages.formats.gguf_source import refusal
from stages.formats.turns import end_of_turn
from stages.sources.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, WITHOUT_STRIP
from stages.sources.pretokenizers import by_steps
from stages.templating.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's keys; `strips_right`: white space behind a control token belongs to it, as in Phi-3."""

    metadata: dict[str, Any]
    strips_right: bool


def read_vocabulary(directory: Path, *, rows: int, config: dict[str, Any]) -> Vocabulary:
    """The keys of a directory's tokenizer, its tokens as many as the embedding has `rows`.

    Raises:
        ValueError: llama.cpp has no form for it that gives the same tokens.
    """
    tokenizer = load_tokenizer(directory)
    text = TextTokenizer(tokenizer)
    state = json.loads(text.backend.to_str())
    added = {token["id"]: token for token in state["added_tokens"]}
    if state["model"].get("type") != "BPE":
        raise refusal(directory, f"a tokenizer of the type {state['model'].get('type')} has no proven form")
    # A token without a row in the embedding can be no part of any text that the model was trained on.
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i < rows}
    if tokenizer.eos_token_id >= rows:
        raise ValueError(
            f"{directory}: its EOS token, {tokenizer.eos_token_id}, has no row in the embedding; resize it"
        )
    names = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    try:
        own = _sentencepiece(state, names, added) if state["model"].get("byte_fallback") else _byte_level(state)
        strips = _strips_right(added)
    except ValueError as error:
        raise refusal(directory, str(error)) from None
    metadata = own | {
        "tokenizer.ggml.tokens": [_written(i, name, added, own) for i, name in enumerate(names)],
        "tokenizer.ggml.token_type": [_type(i, name, tokens, added, own, tokenizer) for i, name in enumerate(names)],
        "tokenizer.ggml.add_bos_token": text.prefix > 0,
        "tokenizer.ggml.add_eos_token": text.suffix > 0,
    }
    return Vocabulary(metadata | _roles(tokenizer, config, rows), strips)


def _type(i: int, name: str, tokens: dict[int, str], added: dict[int, Any], own: dict[str, Any], tokenizer: Any) -> int:
    if i not in tokens:
        return UNUSED
    spm = own["tokenizer.ggml.model"] == "llama"
    if spm and i == tokenizer.unk_token_id:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return BYTE if spm and _is_byte(name) else NORMAL


def _written(i: int, name: str, added: dict[int, Any], own: dict[str, Any]) -> str:
    """A token as llama.cpp looks for it: one that is found in a text before spaces become ▁ has spaces."""
    early = own["tokenizer.ggml.model"] == "llama" and i in added and not added[i]["special"]
    return name.replace("▁", " ") if early else name


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _byte_level(state: dict[str, Any]) -> dict[str, Any]:
    steps = _parts(state["pre_tokenizer"], "pretokenizers")
    model = state["model"]
    found = by_steps(steps, ignore_merges=bool(model.get("ignore_merges")))
    if found is None:
        raise ValueError(f"its pre-tokenizer is none of those known here ({json.dumps(steps, ensure_ascii=False)})")
    # llama.cpp normalises no text. What NFC makes of text that is composed already is the same text.
    normalizers = {part["type"] for part in _parts(state["normalizer"], "normalizers")}
    if normalizers - {"NFC"}:
        raise ValueError(f"its normalizer ({', '.join(sorted(normalizers))}) has no proven form")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("its BPE has a dropout, a prefix or a suffix, which have no proven form")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": found.name,
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]],
    }


def _sentencepiece(state: dict[str, Any], names: list[str], added: dict[int, Any]) -> dict[str, Any]:
    prefix = _space_prefix(state)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(state["model"], names, added),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(state: dict[str, Any]) -> bool:
    """True if a space goes before a text; spaces become ▁ either way.

    Raises:
        ValueError: the steps before BPE are others than SentencePiece's.
    """
    normalizers = _parts(state["normalizer"], "normalizers")
    steps = _parts(state["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if normalizers == [{"type": "Prepend", "prepend": "▁"}, replace] and not steps:
        return True
    # Every space is ▁ by then: a step that splits at spaces finds none.
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if normalizers == [replace] and steps in ([], [at_spaces]):
        return False
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace" and steps[0].get("split") is False:
        scheme = steps[0].get("prepend_scheme")
        if scheme in ("always", "never") and steps[0].get("replacement") == "▁":
            return bool(scheme == "always")
    shown = json.dumps([*normalizers, *steps], ensure_ascii=False)
    raise ValueError(f"the steps before its BPE are none of those known here ({shown})")


def _scores(model: dict[str, Any], names: list[str], added: dict[int, Any]) -> list[float]:
    """Scores by which llama.cpp merges as the merges say: the later a token is merged, the lower.

    llama.cpp merges any two neighbours that make a token, the best score first. So every pair that makes a token has to
    be a merge, and the merges that make one token have to follow each other.

    Raises:
        ValueError: the merges are not like that.
    """
    vocabulary, pairs = model["vocab"], [_pair(merge) for merge in model["merges"]]
    whole = {token["content"] for token in added.values()}  # found in a text before any merge
    ranks: dict[str, int] = {}
    last = None
    for made in (left + right for left, right in pairs):
        if made != last and made in ranks and made not in whole:
            raise ValueError(f"its merges are no SentencePiece model's: those for {made!r} stand apart")
        ranks.setdefault(made, len(ranks))
        last = made
    known = set(pairs)
    for token in names:
        for cut in range(1, len(token) if token in vocabulary and token not in whole else 0):
            pair = token[:cut], token[cut:]
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise ValueError(f"its merges are no SentencePiece model's: {pair[0]!r} and {pair[1]!r} do not merge")
    lowest = float(-len(ranks) - 1)
    return [float(-ranks[name]) if name in ranks else lowest for name in names]


def _strips_right(added: dict[int, Any]) -> bool:
    """True if the control tokens take white space behind them, as llama.cpp lets those of Phi-3.

    Raises:
        ValueError: some other tokens do.
    """
    right = {token["content"] for token in added.values() if token["rstrip"]}
    special = {token["content"] for token in added.values() if token["special"]}
    if any(token["lstrip"] or token["single_word"] for token in added.values()):
        raise ValueError("an added token with lstrip or single_word has no proven form")
    if right and right | WITHOUT_STRIP != special | WITHOUT_STRIP | ({"</s>"} & right):
        raise ValueError("added tokens with rstrip, other than Phi-3's, have no proven form")
    return bool(right)


def _roles(tokenizer: Any, config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The ids of BOS, EOS, end of turn, padding and unknown, and the chat template."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": next((i for i in stop_ids(tokenizer, config) if i != tokenizer.eos_token_id), None),
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": i for role, i in ids.items() if i is not None and i < rows
    }
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = str(tokenizer.get_chat_template())
    return keys


def stop_ids(tokenizer: Any, config: dict[str, Any]) -> list[int]:
    """The tokens that end an answer: the one of the chat template, EOS, and the config's."""
    turn = end_of_turn(tokenizer)
    named = config.get("eos_token_id")
    ids = [tokenizer.convert_tokens_to_ids(turn)] if turn else []
    ids += [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named] if named is not None else [])]
    return list(dict.fromkeys(int(i) for i in ids))


def generation_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config, with the EOS ids of generation_config.json where it is there: these are the ones that stop."""
    path = directory / "generation_config.json"
    found = read_json(path, "take a whole copy").get("eos_token_id") if path.exists() else None
    return config if found is None else config | {"eos_token_id": found}


def _parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: none, one, or a sequence of them."""
    if node is None:
        return []
    return list(node[key]) if node["type"] == "Sequence" else [node]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
