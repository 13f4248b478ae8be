"""The parameters of a command, and how its process rounds: settled before NumPy and MLX are imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stages.params.loading import PARAMS_FILE, ParamsError, load_params
from stages.params.schema import Params

_VARIABLE = "LORABUILD_NUMERICS"


def load_settings(path: Path, overrides: Sequence[str] | None) -> Params:
    """Read and check the parameters (see `load_params`), and settle by `model.numerics` how this process rounds.

    Call it before anything that imports NumPy or MLX.

    Raises:
        ValueError: the parameters are wrong, or this machine cannot compute so.
    """
    settings = load_params(path, overrides or ())
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = settings.model.numerics  # what the first import goes by
    try:
        from stages.model import numerics
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
    numerics.settle(settings.model.numerics)
    return settings


def settle_to_look() -> str | None:
    """Settle by params.yaml where that can be, and natively elsewhere, for a command that keeps nothing it computes.

    Returns why its numerics cannot be had here, if so.
    """
    try:
        load_settings(PARAMS_FILE, None)
    except ParamsError:  # another command's to complain about
        return None
    except ValueError as error:
        os.environ[_VARIABLE] = "native"
        return str(error)
    return None
