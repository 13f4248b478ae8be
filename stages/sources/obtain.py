"""Where base models come from: the built-in alias, the Hugging Face Hub, a local directory.

`obtain(model)` answers with a complete folder on this machine. It asks the network only for what this machine lacks.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.params.schema import Model
from stages.sources.copies import Copy
from stages.sources.hub import from_hub
from stages.sources.package import PACKAGES, from_package


def obtain(model: Model, *, refresh: bool = False) -> Copy:
    """A copy of the base model that `params.yaml` names; `refresh` asks the Hub where a branch stands now.

    Raises:
        ValueError: the source does not exist, or cannot be reached and is not on this machine.
    """
    if model.source in PACKAGES:
        if model.revision is not None:
            raise ValueError(f"model.revision: the built-in {model.source} has one revision only; set it to null")
        return from_package(model.source)
    directory = Path(os.path.expanduser(model.source))  # noqa: PTH111  Path's own raises where there is no such user
    if directory.is_dir():
        if model.revision is not None:
            raise ValueError(
                f"model.revision: {model.source} is a local directory, which has no revisions; set it to null"
            )
        return Copy(directory, f"directory:{directory.resolve().name}", None, {})
    if model.source.startswith((".", "/", "~")) or model.source.count("/") != 1:
        raise ValueError(
            f"model.source: {model.source!r} is neither a directory, nor a Hub id (org/name), "
            f"nor a built-in model ({', '.join(PACKAGES)})"
        )
    return from_hub(model.source, model.revision, with_code=model.trust_remote_code, refresh=refresh)
