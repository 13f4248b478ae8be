"""Tokenizers of a few lines, in memory: one token a byte, with the merges and templates that a test asks for."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from stages.params import schema
from stages.params.loading import load_params
from stages.templating.template import ChatTemplate, Conversation
from stages.templating.tokenizer import TextTokenizer
from tests.support.imports import ROOT
from tests.support.templates import Family

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<s>")


def tokenizer(
    *merges: tuple[str, str],
    template: str | None = CHATML,
    bos: bool = False,
    trim: bool = False,
    family: Family | None = None,
) -> Any:
    """A byte-level tokenizer; `bos`: it puts <s> before a text; `trim`: it trims white space from offsets.

    Of a `family` it has the template and the control tokens.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (family.control if family else SPECIAL)]
    )
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        parts.append(
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
        )
    if parts:
        backend.post_processor = processors.Sequence(parts)
    names = {"eos_token": "<|end|>", **({"bos_token": "<s>"} if bos else {})}
    if family:
        names = {"eos_token": family.eos, **({"bos_token": family.bos} if family.bos else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.chat_template = family.template if family else template
    return made


def options(**changes: Any) -> schema.Tokenize:
    """The `tokenize` section of the project's params.yaml without overlap, with changes."""
    return schema.Tokenize(**{**_defaults(), "overlap": 0, **changes})


@cache
def _defaults() -> dict[str, Any]:
    return load_params(ROOT / "params.yaml").tokenize.model_dump()


def chat_template(template: str | None, *, date: str = "2026-01-01", family: Family | None = None) -> ChatTemplate:
    """A chat template, or a family's, for the tokenizer of `tokenizer`."""
    made = tokenizer(template=template, family=family)
    return ChatTemplate(made, template if family else None, date=date, control=TextTokenizer(made).control)


def said(conversation: Conversation) -> list[str]:
    """The text that is learned of each answer."""
    return ["".join(conversation.text[s.start : s.end] for s in answer.spans) for answer in conversation.answers]
