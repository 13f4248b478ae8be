"""Scores of answers, Korean ones among them."""

from __future__ import annotations

import pyarrow as pa
import pytest

from stages.results import answers


def test_units_are_syllables_in_korean_and_words_elsewhere() -> None:
    assert answers.units("GPT-4는 좋다, ok!") == ["gpt", "4", "는", "좋", "다", "ok"]


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert answers.rouge_l("바다는 파랗다", "바다는 넓다") == pytest.approx(2 * 4 / 11)  # 바 다 는 다
    assert answers.rouge_l("the cat sat", "The cat lay") == pytest.approx(2 / 3)
    assert answers.rouge_l("", "x") == 0 and answers.rouge_l("x", "x") == 1 and answers.rouge_l("…", "…") == 1


def test_chrf_is_sacrebleus() -> None:
    from sacrebleu.metrics.chrf import CHRF

    assert answers.chrf("바다는 파랗다", "바다는 넓다") == CHRF().sentence_score("바다는 파랗다", ["바다는 넓다"]).score
    assert answers.chrf("", "x") == 0 and answers.chrf("같다", "같다") == pytest.approx(100)


def test_matches() -> None:
    assert answers.exact_match(" yes\n", "yes") and not answers.exact_match("Yes", "yes")
    assert answers.normalized_match("Ｙｅｓ, it is!", "yes it is") and not answers.normalized_match("no", "yes")


def test_repetition_is_the_share_of_runs_said_before() -> None:
    assert answers.repetition("a b c d e") == 0
    assert answers.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert answers.repetition("a b") == 0


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (['{"a": 1}', "[1, 2]"], "json"),
        (["SELECT a FROM t WHERE b = 'x'", "DELETE FROM t"], "sql"),
        (['{"a": 1}', "hello"], None),
        (["hello world", "SELECT 1"], None),
        (["1", "2"], None),
        ([], None),
    ],
)
def test_the_format_is_that_of_all_references(references: list[str], name: str | None) -> None:
    assert answers.format_of(references) == name


def test_an_answer_parses_inside_a_fence_too() -> None:
    assert answers.parses('```json\n{"a": 1}\n```', "json") and not answers.parses('{"a": 1', "json")
    assert answers.parses("```sql\nSELECT 1\n```", "sql") and not answers.parses("SELECT FROM WHERE", "sql")
    assert not answers.parses("hello world", "sql")


def test_a_table_gets_every_score_of_both_models() -> None:
    table = pa.table({"reference": ['{"a": 1}'], "base": ["no"], "tuned": ['{"a": 1}']})
    row = answers.with_answer_scores(table).to_pylist()[0]
    assert (row["base_exact_match"], row["tuned_exact_match"], row["base_parses"], row["tuned_parses"]) == (0, 1, 0, 1)
    assert {f"{model}_{name}" for model in ("base", "tuned") for name in answers.SCORES} <= set(row)
