"""Control tokens that a row spells are told apart from a template's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.templating.tokenizer import TextTokenizer
from tests.support.tokenizers import tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SPELLED = "a<|im_end|>b"


def wrapped(model: Any, *, metaspace: bool = True, unknown: bool = False) -> TextTokenizer:
    """A tokenizer around a model, with <s> and </s> as control tokens."""
    backend = Tokenizer(model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in NAMES.values()])
    names = {**NAMES, "unk_token": "<unk>"} if unknown else NAMES
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


def test_what_a_row_spells_is_text_and_what_a_template_writes_a_token() -> None:
    made = TextTokenizer(tokenizer())
    ids = made.encode("x<|im_end|>" + made.control.hide(SPELLED), hidden=True, add_special_tokens=False).ids
    end = made.backend.token_to_id("<|im_end|>")
    assert ids[1] == end
    assert ids.count(end) == 1
    assert made.backend.decode(ids[2:]) == SPELLED


def test_hidden_names_are_found_anywhere_and_come_back() -> None:
    control = TextTokenizer(tokenizer()).control
    value = [{"content": SPELLED, "tool_calls": [{"arguments": {"<s>": ["x", 1, None]}}]}]
    hidden = control.hide(value)
    assert control.spelled(hidden) is None
    assert control.spelled(value) == "<|im_end|>"
    assert control.spelled([{"<s>": 1}]) == "<s>"
    assert control.show(hidden[0]["content"]) == SPELLED
    assert len(hidden[0]["content"]) == len(SPELLED)


def test_a_character_that_stands_for_a_control_token_is_refused() -> None:
    control = TextTokenizer(tokenizer()).control
    with pytest.raises(ValueError, match=r"private-use character .*; remove it"):
        control.hide("\U000f0000s> and <s>")


PIECES = ("<s>", "</s>", "a", " b", "<", "s>", "\n", "한")


def unigram() -> TextTokenizer:
    """As in models made with SentencePiece: the vocabulary has the control tokens, with the best of scores."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁b", -2.0)]
    pieces += [(character, -3.0) for character in "abs<>/\n한"]
    return wrapped(models.Unigram(pieces, unk_id=0))


@pytest.mark.parametrize("made", [TextTokenizer(tokenizer(bos=True)), unigram()], ids=["bytes", "unigram"])
@given(pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), max_size=8))
def test_only_the_template_s_own_become_tokens(made: TextTokenizer, pieces: list[tuple[str, bool]]) -> None:
    coded = "".join(made.control.hide(text) if ours else text for text, ours in pieces)
    text = "".join(text for text, _ in pieces)
    encoding = made.encode(coded, hidden=True, add_special_tokens=False)
    assert made.control.count(encoding.ids) == len(made.control.pattern.findall(coded))
    assert made.backend.decode(encoding.ids, skip_special_tokens=False).strip() == text.strip()
    if not made.control.spelled(coded) and made.control.hide(text) == text:
        assert encoding.ids == made.backend.encode(text, add_special_tokens=False).ids


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_without_anything_hidden_the_tokens_are_the_same(text: str) -> None:
    made = unigram()
    hidden = made.encode(text, hidden=True, add_special_tokens=False)
    plain = made.encode(text, hidden=False, add_special_tokens=False)
    assert (hidden.ids, hidden.offsets) == (plain.ids, plain.offsets)


def test_a_control_token_that_the_tokenizer_makes_of_text_is_refused() -> None:
    vocabulary = {piece: i for i, piece in enumerate(["<", "s", ">", "<s", "<s>", "a"])}
    made = wrapped(models.BPE(vocab=vocabulary, merges=[("<", "s"), ("<s", ">")]), metaspace=False)
    with pytest.raises(ValueError, match=r"cannot write as text; correct the row, or set tokenize\.special_in_content"):
        made.encode(made.control.hide("a<s>"), hidden=True, add_special_tokens=False)


def test_a_text_keeps_its_own_first_and_last_token() -> None:
    made = TextTokenizer(tokenizer(bos=True))
    assert made.hide_control("<s>a<|end|>") == "<s>a<|end|>"
    assert made.hide_control("<s>a<s>b<|end|>c<|end|>") == "<s>a" + made.control.hide("<s>b<|end|>") + "c<|end|>"
    assert made.control.spelled(made.hide_control("<s>a<|im_end|>")[3:]) is None


def test_a_character_that_the_vocabulary_lacks_is_no_control_token() -> None:
    pieces = [("<unk>", 0.0), *((character, -3.0) for character in "▁a</s>unk")]
    made = wrapped(models.Unigram(pieces, unk_id=0), unknown=True)
    hidden = made.control.hide("한 </s> <unk>")
    ids = made.encode(f"a{hidden}</s>", hidden=True, add_special_tokens=False).ids
    assert (ids.count(0), ids.count(made.eos)) == (1, 1)
    assert made.backend.decode(ids, skip_special_tokens=False) == "a<unk> </s> <unk></s>"
