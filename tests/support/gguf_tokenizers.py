"""Small trained tokenizers of the two kinds that GGUF has a form for, with their chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stages.sources.pretokenizers import by_name
from tests.support.tokenizers import CHATML

VOCABULARY = 448
CONTROL = ("<unk>", "<s>", "<|im_start|>", "<|im_end|>")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep, and we're not. HELLO Hello hello",
    "바다는 왜 파란가요? 바다는 하늘의 빛을 받아서 파랗게 보입니다. 질문: 답변: 안녕하세요",
    "def add(left, right):\n    return left + right  # 12345 67\n\n\nprint(add(1, 2))\n",
    "in the sea there is water; the water is in the sea  and   in    the river",
] * 4
TEXTS = {
    "english": "The dogs don't jump; they're lazy. It's 2026, HELLO!",
    "korean": "바다는 왜 파란가요? 하늘 때문입니다.",
    "code": "def f(x):\n    if x > 10:\n\t\treturn x**2  # 123456\n\n\n",
    "emoji": "Hi 👋🏽 the 🐕‍🦺 dog 🇰🇷",
    "spaces": "  two   three    four \n\n \n  end  ",
    "one": "a",
}


def write_byte_level(folder: Path, pre: str = "qwen2", *, bos: bool = False, template: str | None = CHATML) -> None:
    """Write a byte-level BPE trained on CORPUS, with a pre-tokenizer by llama.cpp's name."""
    known = by_name(pre)
    assert known is not None
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": known.steps()}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    _save(folder, tokenizer, bos=bos, template=template)


def write_sentencepiece(folder: Path, *, prefix: bool, template: str | None = CHATML) -> None:
    """Write a BPE with byte fallback, its merges as converted from a SentencePiece model; `prefix`: a space goes before
    a text, as in Llama 2 and Phi-3, and not in Gemma."""
    spaces = normalizers.Replace(" ", "▁")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 256 - len(CONTROL), show_progress=False, limit_alphabet=100)
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *bytes_, *(token for token, _ in trained)])}
    model = models.BPE(
        vocab=vocabulary, merges=_all_merges(vocabulary), byte_fallback=True, fuse_unk=True, unk_token=CONTROL[0]
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    _save(folder, made, bos=True, template=template)


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the lowest id first: what a SentencePiece model's scores say."""
    merges = []
    for token in sorted(vocabulary, key=lambda token: vocabulary[token]):
        if token not in CONTROL and not token.startswith("<0x"):
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return merges


def _save(folder: Path, tokenizer: Tokenizer, *, bos: bool, template: str | None) -> None:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
