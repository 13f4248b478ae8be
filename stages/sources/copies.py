"""A base model on this machine, and what its files must be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.base.manifest import Manifest


@dataclass(frozen=True)
class Copy:
    """A base model on this machine, and the sha256 that its files must have, where the source tells."""

    directory: Path
    source: str
    revision: str | None
    expected: dict[str, str]

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


def unlink_through(path: Path) -> None:
    """Delete a link and all that it leads to."""
    while path.is_symlink():
        link, path = path, path.parent / path.readlink()
        link.unlink()
    path.unlink(missing_ok=True)
