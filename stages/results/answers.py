"""Scores of an answer against its row's reference.

Words are counted in units that fit Korean as well: a Hangul syllable, a Han character and a kana each by itself, other
letters and digits word by word, in lower case. ROUGE-L compares the longest common subsequence of these units: Lin,
"ROUGE: A Package for Automatic Evaluation of Summaries" (2004). chrF is that of a single sentence, by sacrebleu:
Popović, "chrF: character n-gram F-score for automatic MT evaluation" (2015).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import sqlglot
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics.chrf import CHRF
from sqlglot import errors, expressions

SCORES = ("exact_match", "normalized_match", "chrf", "rouge_l", "repetition")
SHARES = ("exact_match", "normalized_match", "stopped", "parses")  # of answers: each is 0 or 1
_ALONE = r"\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
_UNIT = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[^\W_])+")
_FENCED = re.compile(r"\A```[a-zA-Z]*\n(.*?)\n?```\Z", re.DOTALL)
_STATEMENTS = (
    expressions.Query, expressions.Insert, expressions.Update, expressions.Delete, expressions.Merge,
    expressions.Create, expressions.Drop, expressions.Alter,
)  # fmt: skip
_REPEATED = 4  # units in a row


def units(text: str) -> list[str]:
    """The units of a text that ROUGE-L and repetition count."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference, white space around them apart."""
    return float(answer.strip() == reference.strip())


def normalized_match(answer: str, reference: str) -> float:
    """1 if they are the same but for case, width, punctuation and white space."""
    return float(_bare(answer) == _bare(reference))


def _bare(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(symbol for symbol in folded if unicodedata.category(symbol)[0] not in "PZC")


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF, 0 to 100."""
    if not answer.strip() or not reference.strip():
        return 100.0 * exact_match(answer, reference)
    return float(_CHRF.sentence_score(answer, [reference]).score)


_CHRF = CHRF()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of units, 0 to 1."""
    said, wanted = units(answer), units(reference)
    if not said or not wanted:
        return exact_match(answer, reference)
    common = LCSseq.similarity(said, wanted)
    return 2 * common / (len(said) + len(wanted))


def repetition(answer: str) -> float:
    """Share of an answer's runs of four units that occurred in it before, 0 to 1."""
    said = units(answer)
    runs = [tuple(said[i : i + _REPEATED]) for i in range(len(said) - _REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def format_of(references: Sequence[str]) -> str | None:
    """`json` or `sql` if every reference is an object or a list of it, or a statement of it; None else."""
    for name in ("json", "sql"):
        if references and all(parses(reference, name) for reference in references):
            return name
    return None


def parses(answer: str, name: str) -> bool:
    """True if an answer, a Markdown fence around it apart, is an object or list in JSON, or a statement in SQL."""
    fenced = _FENCED.match(answer.strip())
    text = fenced[1] if fenced else answer
    if name == "json":
        try:
            return isinstance(json.loads(text), dict | list)
        except (ValueError, RecursionError):
            return False
    try:
        return isinstance(sqlglot.parse_one(text), _STATEMENTS)
    except (errors.SqlglotError, RecursionError):
        return False


def with_answer_scores(table: Any) -> Any:
    """The table of answers with the columns `base_chrf`, `tuned_chrf` and so on: every score, of both models."""
    references = table["reference"].to_pylist()
    name = format_of(references)
    for model in ("base", "tuned"):
        answers = table[model].to_pylist()
        pairs = list(zip(answers, references, strict=True))
        columns: dict[str, list[float]] = {
            "exact_match": [exact_match(*pair) for pair in pairs],
            "normalized_match": [normalized_match(*pair) for pair in pairs],
            "chrf": [round(chrf(*pair), 4) for pair in pairs],
            "rouge_l": [round(rouge_l(*pair), 6) for pair in pairs],
            "repetition": [round(repetition(answer), 6) for answer in answers],
        }
        if name is not None:
            columns["parses"] = [float(parses(answer, name)) for answer in answers]
        for column, values in columns.items():
            table = table.append_column(f"{model}_{column}", pa.array(values, pa.float64()))
    return table
