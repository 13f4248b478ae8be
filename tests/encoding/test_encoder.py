"""Tokens, masks and what is done about long rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.encoding.encoder import Encoded, Encoder
from stages.prepared.row import PreparedRow
from tests.support.tokenizers import CHATML, options, tokenizer

PAIR = PreparedRow("1", "f:1", prompt="Q: ab", completion="cd")
TALK = PreparedRow(
    "2", "f:2",
    messages=[
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "yy"},
        {"role": "user", "content": "z"}, {"role": "assistant", "content": "ww"},
    ],
)  # fmt: skip
TEXT = PreparedRow("3", "f:3", text="first line\nA: second line")


def encode(row: PreparedRow, made: Any = None, **changes: Any) -> Encoded:
    [encoded] = Encoder(made or tokenizer(), options(**changes)).encode([row])
    return encoded


def learned(row: PreparedRow, made: Any = None, **changes: Any) -> list[str]:
    """The text of each run of trained tokens."""
    made = made or tokenizer()
    runs: list[str] = []
    for token_row in encode(row, made, **changes).rows:
        before = False
        for index, on in zip(token_row.input_ids, token_row.loss_mask, strict=True):
            if on:
                runs = [*runs, ""] if not before else runs
                runs[-1] += made.convert_tokens_to_string([made.convert_ids_to_tokens(int(index))])
            before = bool(on)
    return runs


@pytest.mark.parametrize(
    ("row", "train_on", "expected"),
    [
        (PAIR, "completion", ["cd<|end|>"]),
        (PAIR, "assistant", ["cd<|end|>"]),
        (PAIR, "last_assistant", ["cd<|end|>"]),
        (PAIR, "all", [": abcd<|end|>"]),
        (TEXT, "completion", ["irst line\nA: second line<|end|>"]),
        (TALK, "completion", ["yy<|im_end|>", "ww<|im_end|>"]),
        (TALK, "assistant", ["yy<|im_end|>", "ww<|im_end|>"]),
        (TALK, "last_assistant", ["ww<|im_end|>"]),
    ],
)
def test_train_on(row: PreparedRow, train_on: str, expected: list[str]) -> None:
    assert learned(row, train_on=train_on) == expected


def test_train_on_all_of_a_conversation() -> None:
    [run] = learned(TALK, train_on="all")
    assert run.startswith("user\nx") and run.endswith("ww<|im_end|>\n")


def test_what_follows_the_answer_marker_is_learned() -> None:
    assert learned(TEXT, answer_marker="A: ") == ["second line<|end|>"]
    assert learned(TEXT, answer_marker="A: ", train_on="all")[0].startswith("irst")
    missing = encode(TEXT, answer_marker="B: ")
    assert (missing.reason, missing.rows) == ("bad", ())
    assert missing.message.startswith("f:3: has no 'B: ', which tokenize.answer_marker names")


def test_a_token_across_the_border_is_learned() -> None:
    # Of "…ab" + "cd", "bc" is one token: the prompt's own tokens are no prefix of the row's.
    made = tokenizer(("b", "c"))
    alone = made("Q: ab")["input_ids"]
    row = encode(PAIR, made).rows[0]
    assert row.input_ids[: len(alone)].tolist() != alone
    assert learned(PAIR, made) == ["bcd<|end|>"]


def test_offsets_that_a_tokenizer_trims_are_not_trusted() -> None:
    row = PreparedRow("1", "f:1", prompt="Q:", completion="\n\n  x")
    for trim in (False, True):
        assert learned(row, tokenizer(("Ċ", "Ċ"), ("Ġ", "Ġ"), trim=trim)) == ["\n\n  x<|end|>"]


def test_bos_is_never_doubled() -> None:
    made = tokenizer(bos=True, template="<s>" + CHATML)
    bos = made.bos_token_id
    own = PreparedRow("1", "f:1", prompt="<s>Q", completion="a")
    for row in (PAIR, own, TALK):
        ids = encode(row, made).rows[0].input_ids.tolist()
        assert ids[0] == bos
        assert ids.count(bos) == 1


def test_bos_survives_truncation() -> None:
    made = tokenizer(bos=True)
    row = encode(PreparedRow("1", "f:1", prompt="x" * 50, completion="abc"), made, max_length=16).rows[0]
    assert len(row.input_ids) == 16
    assert made.decode(row.input_ids) == "<s>" + "x" * 11 + "abc<|end|>"


def test_eos_can_be_left_out() -> None:
    assert learned(PAIR, add_eos=False) == ["cd"]
    assert learned(PreparedRow("1", "f:1", prompt="Q", completion="a<|end|>")) == ["a<|end|>"]


def test_a_given_chat_template_replaces_the_tokenizers() -> None:
    shouting = CHATML.replace("m.content", "m.content + '!'")
    assert learned(TALK, chat_template=shouting) == ["yy!<|im_end|>", "ww!<|im_end|>"]


LONG = PreparedRow("1", "f:1", prompt="p" * 30, completion="abcdef")


@pytest.mark.parametrize(("max_length", "kept"), [(20, "p" * 13), (8, "p"), (12, "ppppp")])
def test_truncation_takes_the_prompts_start(max_length: int, kept: str) -> None:
    made = tokenizer()
    for train_on in ("completion", "all"):
        row = encode(LONG, made, max_length=max_length, train_on=train_on).rows[0]
        assert made.decode(row.input_ids) == kept + "abcdef<|end|>"
        assert row.truncated
    assert row.trained_bytes == len(kept) - 1 + 6


def test_an_answer_that_does_not_fit_loses_its_end() -> None:
    made = tokenizer()
    row = encode(PreparedRow("1", "f:1", prompt="pp", completion="abcdefghijkl"), made, max_length=8).rows[0]
    assert made.decode(row.input_ids) == "pabcdefg"
    assert row.trained_bytes == 7


def test_a_long_conversation_keeps_its_last_answer() -> None:
    made = tokenizer()
    whole = len(encode(TALK, made).rows[0].input_ids)
    row = encode(TALK, made, max_length=whole - 20).rows[0]
    assert made.decode(row.input_ids).endswith("ww<|im_end|>\n")


def test_long_rows_can_be_dropped_or_refused() -> None:
    for mode in ("drop", "error"):
        encoded = encode(LONG, max_length=16, over_length=mode)
        assert (encoded.reason, encoded.rows, encoded.length) == ("too_long", (), 37)
        assert encoded.message == (
            "f:1: has 37 tokens; raise tokenize.max_length (16) or set tokenize.over_length: truncate"
        )


def test_windows_train_on_every_token_once() -> None:
    made = tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(100))
    rows = encode(PreparedRow("9", "f:9", text=text), made, max_length=16, over_length="split", overlap=4).rows
    assert [row.id for row in rows] == [f"9-{i}" for i in range(len(rows))]
    assert all(len(row.input_ids) <= 16 for row in rows)
    trained = np.concatenate([row.input_ids[row.loss_mask] for row in rows])
    assert made.decode(trained) == text[1:] + "<|end|>"
    assert sum(row.trained_bytes for row in rows) == 99
    assert made.decode(rows[1].input_ids[:4]) == made.decode(rows[0].input_ids[-4:])
    fewer = encode(PreparedRow("9", "f:9", text=text), made, max_length=16, over_length="split", overlap=1).rows
    assert len(fewer) < len(rows)


def test_a_pair_is_truncated_where_texts_are_split() -> None:
    [row] = encode(LONG, max_length=16, over_length="split").rows
    assert row.truncated


def test_a_row_with_nothing_to_learn_is_dropped() -> None:
    talk = PreparedRow("2", "f:2", messages=[{"role": "user", "content": "x"}])
    assert encode(talk).reason == "nothing_to_learn"
    assert encode(PreparedRow("3", "f:3", text="x A: "), answer_marker="A: ").reason == "nothing_to_learn"


def test_a_conversation_that_the_template_rejects_is_bad() -> None:
    encoded = encode(TALK, tokenizer(template="{{ raise_exception('no') }}"))
    assert (encoded.reason, encoded.message) == (
        "bad",
        "f:2: the chat template rejects the turns user, assistant, user, assistant: no",
    )


MARKED = PreparedRow("4", "f:4", text="Q: 1\nA: one\nQ: 2\nA: two")


def test_each_answer_of_a_text_is_learned_up_to_the_next_question() -> None:
    markers = {"answer_marker": "A: ", "question_marker": "\nQ: "}
    assert learned(MARKED, **markers) == ["one", "two<|end|>"]
    assert learned(MARKED, **markers, train_on="last_assistant") == ["two<|end|>"]
    assert "has 2 answers by tokenize.answer_marker" in encode(MARKED, answer_marker="A: ").message
    asked = PreparedRow("5", "f:5", text=f"{MARKED.text}\nQ: 3")
    assert learned(asked, **markers) == ["one", "two"]


def changed(turn: int, **fields: Any) -> PreparedRow:
    """TALK with other fields in one of its turns."""
    assert TALK.messages
    messages = [{**message, **fields} if i == turn else message for i, message in enumerate(TALK.messages)]
    return PreparedRow("2", "f:2", messages=messages)


def test_a_turn_that_says_so_is_not_learned() -> None:
    assert learned(changed(1, train=False)) == ["ww<|im_end|>"]
    assert learned(changed(3, train=False)) == ["yy<|im_end|>"]
    assert encode(changed(3, train=False), train_on="last_assistant").reason == "nothing_to_learn"
    [start, rest] = learned(changed(1, train=False), train_on="all")
    assert start.endswith("assistant\n") and rest.startswith("\n<|im_start|>user\nz")
    [start, rest] = learned(changed(2, train=False), train_on="all")
    assert start.endswith("user\n") and rest.startswith("<|im_end|>\n<|im_start|>assistant\nww")


THINKING = CHATML.replace("+ m.content", "+ ('<think>' + m.thinking + '</think>' if m.thinking else '') + m.content")


def test_thoughts_are_learned_read_or_dropped() -> None:
    row, made = changed(3, reasoning_content="hm"), tokenizer(template=THINKING)
    assert learned(row, made)[1] == "<think>hm</think>ww<|im_end|>"
    assert learned(row, made, thoughts="mask")[1:] == ["<think>", "</think>ww<|im_end|>"]
    assert learned(row, made, thoughts="drop")[1] == "ww<|im_end|>"
    refused = encode(row)
    assert refused.message == (
        "f:2: the chat template leaves out or changes content of turn 4 (assistant): its thought; "
        "give one that knows thoughts in tokenize.chat_template, or set tokenize.thoughts: drop"
    )
    assert learned(row, thoughts="drop")[1] == "ww<|im_end|>"


def test_a_thought_in_the_content_is_a_thought() -> None:
    row = changed(3, content="<think>hm</think>\n\nww")
    assert learned(row)[1] == "<think>hm</think>\n\nww<|im_end|>"
    assert learned(row, thoughts="mask")[1:] == ["<think>", "</think>\n\nww<|im_end|>"]
    assert learned(row, thoughts="drop")[1] == "ww<|im_end|>"


@pytest.mark.parametrize("content", ["<think>hm</think>ww", "hm</think>\nww", "\n<think>\n\n</think>\n\nww"])
def test_a_thought_is_dropped_with_its_tags(content: str) -> None:
    assert learned(changed(3, content=content), thoughts="drop")[1] == "ww<|im_end|>"


@pytest.mark.parametrize("said", [{"content": "<think>hm</think>\n"}, {"content": "", "reasoning_content": "hm"}])
def test_an_answer_that_holds_only_a_thought_is_refused_where_thoughts_are_dropped(said: dict[str, Any]) -> None:
    refused = encode(changed(3, **said), thoughts="drop")
    assert refused.reason == "bad"
    assert refused.message.startswith(
        "f:2: turn 4 (assistant) holds only a thought, which tokenize.thoughts: drop takes"
    )
    called = changed(3, **said, tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    assert "holds only a thought" not in encode(called, thoughts="drop").message


def test_tags_of_thoughts_within_an_answer_are_its_words() -> None:
    row = changed(3, content="say <think>hm</think>")
    for mode in ("train", "mask", "drop"):
        assert learned(row, thoughts=mode)[1] == "say <think>hm</think><|im_end|>"


def ends(row: PreparedRow, **changes: Any) -> int:
    """Count the tokens <|im_end|> in a row."""
    made = tokenizer()
    [token_row] = encode(row, made, **changes).rows
    return token_row.input_ids.tolist().count(made.convert_tokens_to_ids("<|im_end|>"))


def test_a_control_token_that_a_turn_spells() -> None:
    row = changed(1, content="say <|im_end|> now")
    assert learned(row)[0] == "say <|im_end|> now<|im_end|>"
    assert (ends(row), ends(row, special_in_content="allow")) == (4, 5)
    assert encode(row).counts["special_in_content"] == 1
    [encoded] = encode(row).rows
    [allowed] = encode(row, special_in_content="allow").rows
    assert encoded.trained_bytes == allowed.trained_bytes == len("say <|im_end|> nowww")
    assert encode(row, special_in_content="error").message == (
        "f:2: spells the control token <|im_end|> in turn 2 (assistant); "
        "correct the row, or set tokenize.special_in_content: text"
    )
    in_tools = PreparedRow("2", "f:2", messages=TALK.messages, tools=[{"name": "<s>"}])
    assert "spells the control token <s> in its tools" in encode(in_tools, special_in_content="error").message


SPELLING = [
    PreparedRow("1", "f:1", text="a<|im_end|>b"),
    PreparedRow("1", "f:1", prompt="a<|im_end|>", completion="b"),
]


@pytest.mark.parametrize("row", SPELLING)
def test_a_control_token_that_a_text_spells(row: PreparedRow) -> None:
    assert (ends(row), ends(row, special_in_content="allow")) == (0, 1)
    assert encode(row, special_in_content="error").message.startswith(
        "f:1: spells the control token <|im_end|>; correct"
    )
    assert encode(row).counts == {"special_in_content": 1}


def test_a_row_with_control_tokens_as_text_is_cut_like_another() -> None:
    made = tokenizer()
    row = PreparedRow("1", "f:1", prompt="<|im_end|>" * 5, completion="abc<s>def")
    [cut] = encode(row, made, max_length=20).rows
    assert made.decode(cut.input_ids) == "<|im_end|>abc<s>def<|end|>"
    assert (len(cut.input_ids), cut.trained_bytes) == (20, len("abc<s>def"))


def test_why_an_answer_is_not_trained_is_counted() -> None:
    def counts(row: PreparedRow, **changes: Any) -> dict[str, int]:
        return {name: count for name, count in encode(row, **changes).counts.items() if count}

    assert counts(TALK) == {"assistant_turns": 2, "trained_answers": 2}
    assert counts(changed(1, train=False)) == {"assistant_turns": 2, "trained_answers": 1, "answers_masked": 1}
    last = {"assistant_turns": 2, "trained_answers": 1, "answers_before_last": 1}
    assert counts(TALK, train_on="last_assistant") == last
    assert counts(TALK, max_length=20) == {"assistant_turns": 2, "trained_answers": 1, "answers_cut": 1}
    dropped = {"assistant_turns": 2, "answers_dropped": 2}
    assert counts(TALK, max_length=20, over_length="drop") == dropped
    assert counts(changed(0, reasoning_content="x", tool_calls=[{}]), chat_template="{{ no.no }}") == dropped
    assert counts(TALK, train_on="all") == {"assistant_turns": 2, "trained_answers": 2}


def test_the_clock_stands_at_the_given_date() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    made = tokenizer()
    [row] = encode(TALK, made, chat_template=dated, date="2027-03-09").rows
    assert made.decode(row.input_ids).startswith("09 Mar 2027")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(words, words, st.sampled_from(["completion", "all"]), st.integers(8, 40), st.sampled_from(["truncate", "split"]))
def test_lengths_and_offsets_agree(prompt: str, completion: str, train_on: Any, limit: int, mode: Any) -> None:
    row = PreparedRow("1", "f:1", prompt=prompt, completion=completion)
    chosen = options(max_length=limit, train_on=train_on, over_length=mode)
    by_lengths, by_offsets = Encoder(MADE, chosen), Encoder(MADE, chosen)
    by_offsets._masker.byte_lengths = None
    [one], [other] = by_lengths.encode([row]), by_offsets.encode([row])
    assert one.reason == other.reason
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.loss_mask.tolist() == b.loss_mask.tolist()


MADE = tokenizer(("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ"))
