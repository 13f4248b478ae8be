"""The answers of a plain text, found by the markers before answers and before questions."""

from __future__ import annotations

from itertools import pairwise

Range = tuple[int, int]


def answers(text: str, answer_marker: str, question_marker: str | None) -> list[Range]:
    """The characters of each answer, from behind its marker up to the next question's, or to the text's end.

    If the answer's marker stands at the start of a line, or begins with a line's end, both markers count there alone:
    what is quoted within a line is none. Otherwise they count wherever they stand.

    Raises:
        ValueError: there are several answers, and no question's marker between two of them.
    """
    found = _places(text, answer_marker)
    questions = _places(text, question_marker) if question_marker is not None else []
    if any(place and _at_line(text, place) for place in found):
        found, questions = ([place for place in places if _at_line(text, place)] for places in (found, questions))
    begins = [place + len(answer_marker) for place in found]
    ends = []
    for begin, following in pairwise(begins):
        end = next((place for place in questions if begin <= place < following), None)
        if end is None:
            raise ValueError(_unclear(len(begins), answer_marker, question_marker))
        ends.append(end)
    if begins:
        ends.append(next((place for place in questions if place >= begins[-1]), len(text)))
    return list(zip(begins, ends, strict=True))


def _places(text: str, marker: str) -> list[int]:
    found = []
    place = text.find(marker)
    while place >= 0:
        found.append(place)
        place = text.find(marker, place + len(marker))
    return found


def _at_line(text: str, place: int) -> bool:
    return place == 0 or "\n" in (text[place], text[place - 1])


def _unclear(count: int, answer_marker: str, question_marker: str | None) -> str:
    if question_marker is None:
        return (
            f"has {count} answers by tokenize.answer_marker {answer_marker!r}: name what comes before the next "
            "question in tokenize.question_marker, or correct the row"
        )
    return (
        f"has {answer_marker!r} twice without {question_marker!r} between them, which tokenize.question_marker names; "
        "correct the row or the marker"
    )
