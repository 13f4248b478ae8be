"""Columns of pictures, sound and film, and the marks for them in a row's text: refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from stages.schemas.content import Content
from stages.schemas.text import holds, listed

_MEDIA = frozenset(["image", "images", "audio", "audios", "video", "videos"])
_MARK = re.compile("<(image|audio|video)>")  # LLaMA-Factory's, where a picture of the column stands


def refuse_media(row: Mapping[str, Any], exempt: Collection[str]) -> bool:
    """True if the row has columns of media, though empty ones.

    Raises:
        ValueError: one of them holds something, and is none of `exempt`.
    """
    if _MEDIA.isdisjoint(row):
        return False
    names = [name for name in row if name in _MEDIA and name not in exempt]
    if full := [name for name in names if holds(row[name])]:
        raise ValueError(f"holds {listed(full)}; only text is trained here: remove the column, or the rows that use it")
    return bool(names)


def refuse_marks(content: Content) -> None:
    """Raise ValueError if the content of a row with columns of media has a mark for one."""
    for text in _texts(content):
        if found := _MARK.search(text):
            raise ValueError(f"has {found[0]} in its text; only text is trained here: remove the mark, or the row")


def _texts(content: Content) -> Iterator[str]:
    if "messages" in content:
        yield from (message["content"] for message in content["messages"])
    else:
        yield from content.values()
