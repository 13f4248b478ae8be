"""Folders of this machine that git and DVC never see: the store that all checkouts share, and a project's own state."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def root() -> Path:
    """The store's folder: `$LORABUILD_STORE`, or a folder of the user's cache directory."""
    return Path(os.environ.get("LORABUILD_STORE") or platformdirs.user_cache_path("lorabuild"))


def project(name: str) -> Path:
    """`artifacts/name` in the project's own folder, even for an experiment that DVC runs in a folder of its own."""
    return Path(os.environ.get("DVC_ROOT", ".")) / "artifacts" / name
