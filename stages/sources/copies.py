"""A base model on this machine, and what its files must be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.base.manifest import Manifest

CARD = "README.md"  # of a model, with its licence on top


@dataclass(frozen=True)
class Copy:
    """A base model on this machine; where the source tells, its licence, and the sha256 that its files must have."""

    directory: Path
    source: str
    revision: str | None
    expected: dict[str, str]
    license: str | None = None

    def damaged(self, manifest: Manifest) -> list[str]:
        """Names of files whose content is not what the source gave."""
        return [
            name
            for name, digest in self.expected.items()
            if name not in manifest.files or manifest.files[name].sha256 != digest
        ]

    def discard(self, names: list[str]) -> None:
        """Forget damaged files, so that the next `obtain` fetches them."""
        for name in names:
            unlink_through(self.directory / name)


def license_of(directory: Path) -> str | None:
    """The licence that a folder's model card names; None without a card, or one that says nothing readable."""
    from huggingface_hub.repocard import metadata_load

    try:
        about = metadata_load(directory / CARD) or {}
    except Exception:  # a card is a text that people write: whatever its parser trips over
        return None
    names = [about.get(key) for key in ("license", "license_name")]
    found = names[1] if names[0] == "other" else names[0]
    return found if isinstance(found, str) else None


def unlink_through(path: Path) -> None:
    """Delete a link and all that it leads to."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)
