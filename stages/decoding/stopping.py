"""The text of an answer as it grows: without white space at its ends, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """Takes an answer's pieces one by one, and tells what of them may be shown.

    What may yet turn out not to belong to the answer is held back: the start of a stop string, and white space, which
    is dropped at the end. So is half a character, on which the token limit may fall. `stopped`: a stop string came.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._begun = False
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be shown, now that this piece has come; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped = True
            return self._shown(text[: min(places)], held="")
        end = len(text) - held_back(text, self._stops)
        return self._shown(text[:end], held=text[end:])

    def end(self) -> str:
        """What is left to be shown when no more pieces come."""
        return self._shown(self._held, held="")

    def _shown(self, text: str, *, held: str) -> str:
        shown = ended(text)
        # White space before what is held back goes with it.
        self._held = text[len(shown) :] + held
        if not self._begun:
            shown = shown.lstrip()
            self._begun = bool(shown)
        return shown


def ended(text: str) -> str:
    """A text without white space, and without half a character, at its end."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()


def held_back(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of a text with which one of the stop strings may have begun."""
    longest = min(max(map(len, stops), default=0) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
