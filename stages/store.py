"""The per-machine store: what every checkout of the project on this machine shares and git never sees."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def root() -> Path:
    """The store's folder: `$LORABUILD_STORE`, or a folder of the user's cache directory."""
    return Path(os.environ.get("LORABUILD_STORE") or platformdirs.user_cache_path("lorabuild"))
