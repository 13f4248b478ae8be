"""A GGUF's tokenizer → tokenizer.json and tokenizer_config.json.

Source: the GGUF specification, and llama.cpp's `llama-vocab.cpp` for what it does by default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.sources.gguf_reader import GgufFile
from stages.sources.pretokenizers import PreTokenizer, by_name

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # LLAMA_TOKEN_TYPE_*
WITHOUT_STRIP = {"<unk>", "<s>", "<|endoftext|>"}  # control tokens of Phi-3 that leave white space behind them


def write_tokenizer(file: GgufFile, out: Path) -> None:
    """Write the tokenizer's two files.

    Raises:
        ValueError: its kind or its pre-tokenizer is not known here.
    """
    from tokenizers import AddedToken, processors

    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    known = by_name(pre)
    if kind == "gpt2" and known:
        tokenizer = _byte_level(file, known)
    elif kind == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise ValueError(f"the tokenizer {kind!r} with pre-tokenizer {pre!r} is not one this conversion knows")
    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type")
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    # llama.cpp goes by the name.
    strips = "phi-3" in str(file.metadata.get("general.name", "")).lower()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=strips and token not in WITHOUT_STRIP)
            for token in control
        ]
    )
    own = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])
    default = kind == "llama" or pre == "llama-bpe"
    adds_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", default))
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if adds_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", tokens[bos], "$B"], special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_config(file, tokens, out, adds_bos=adds_bos and bos is not None)


def _byte_level(file: GgufFile, known: PreTokenizer) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(file.get("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=known.ignore_merges))
    if known.name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = {"type": "Sequence", "pretokenizers": known.steps()}
    state = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": steps}
    tokenizer.pre_tokenizer = Tokenizer.from_str(json.dumps(state)).pre_tokenizer
    if len(known.steps()) == 1:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile) -> Any:
    """BPE with byte fallback that merges by the file's scores, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = file.get("tokenizer.ggml.tokens")
    scores: list[float] = file.get("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    skipped = {i for i, type_ in enumerate(file.get("tokenizer.ggml.token_type")) if type_ == CONTROL}
    merges = []
    for i in sorted(vocabulary.values(), key=lambda i: (-scores[i], i)):
        if i not in skipped:
            pairs = [(tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i]))]
            known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
            merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _write_config(file: GgufFile, tokens: list[str], out: Path, *, adds_bos: bool) -> None:
    def role(name: str) -> str | None:
        i = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if i is None else tokens[i]

    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_prefix_space": False,
        "bos_token": role("bos"),
        "eos_token": tokens[file.get("tokenizer.ggml.eos_token_id")],
        "pad_token": role("padding"),
        "unk_token": role("unknown"),
        "model_max_length": file.get(f"{file.get('general.architecture')}.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": file.metadata.get("tokenizer.chat_template"),
    }
    text = json.dumps({key: value for key, value in content.items() if value is not None}, ensure_ascii=False, indent=2)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
