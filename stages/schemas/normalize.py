"""Unicode normalisation of a row's text. Source: Unicode Standard Annex #15 (normalisation forms)."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

Form = Literal["NFC", "NFKC"]


def normalized(value: Any, form: Form | None) -> Any:
    """A value with all text inside it in a normal form: a Hangul syllable in NFD is two or three characters, and other
    tokens than the same syllable in NFC."""
    if form is None:
        return value
    if isinstance(value, str):
        return value if unicodedata.is_normalized(form, value) else unicodedata.normalize(form, value)
    if isinstance(value, list):
        return [normalized(item, form) for item in value]
    if isinstance(value, dict):
        return {key: normalized(item, form) for key, item in value.items()}
    return value
