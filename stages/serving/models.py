"""Which models answer: the merged one, or the base with adapters, each under a name. Adapters are switched in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from stages.adapters import find
from stages.base.manifest import locate, read_manifest
from stages.decoding.decode import load_decoder
from stages.lora import adapter
from stages.model.load import load_base
from stages.params import schema
from stages.prompting.prompts import Prompts
from stages.templating.tokenizer import load_tokenizer

MERGED, BASE = "merged", "base"
_NAME = re.compile(r"[\w.-]+")


class Models:
    """One model in memory, and the adapters that can be put on it.

    `names` are what it can be switched to, the one that it is now first. `context_tokens` is the most that prompt and
    answer may have together, None if the config does not say.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        prompts: Prompts,
        *,
        name: str,
        adapters: Mapping[str, adapter.Layers] | None = None,
        context_tokens: int | None = None,
    ) -> None:
        self.model, self.decoder, self.prompts, self.context_tokens = model, decoder, prompts, context_tokens
        self.name = name
        self._layers = {name: [], **(adapters or {})}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def switch(self, name: str) -> None:
        """Let the model be another: no weights are loaded, the base stays where it is.

        Raises:
            ValueError: there is no model of this name.
        """
        if name not in self._layers:
            raise ValueError(f"no model {name!r} here; there are: {', '.join(self.names)}")
        if name != self.name:
            adapter.take_off(self.model)
            adapter.put_on(self.model, self._layers[name])
            self.name = name

    def add(self, name: str, directory: Path) -> None:
        """Load one more adapter; the model stays what it is.

        Raises:
            ValueError: it does not fit the model, or the model is no base.
        """
        if self.names[0] == MERGED:
            raise ValueError("an adapter goes onto the base model, and this is the merged one; start with --base")
        worn = adapter.take_off(self.model)
        try:
            self._layers[name] = load_layers(self.model, directory)
        finally:
            adapter.put_on(self.model, worn)

    def check_length(self, prompt_tokens: int) -> None:
        """Raise ValueError if a prompt leaves no room for an answer."""
        if self.context_tokens is not None and prompt_tokens >= self.context_tokens:
            raise ValueError(
                f"the prompt has {prompt_tokens:,} tokens, the model's context is {self.context_tokens:,}; shorten it"
            )


def open_models(
    settings: schema.Params, *, merged: Path, manifest: Path, base: bool = False, adapters: Sequence[str] = ()
) -> Models:
    """The merged model; with `base` the base model alone, with `adapters` (DIR or NAME=DIR) the base and each of them.

    Raises:
        ValueError: a folder is missing or does not fit.
    """
    named = adapter_folders(adapters)
    if not base and not named:
        if not (merged / "config.json").exists():
            raise ValueError(f"{merged}: no merged model; make it with: python -m stages.merge")
        return _open(merged, settings, name=MERGED)
    models = _open(locate(read_manifest(manifest)), settings, name=BASE)
    for name, directory in named.items():
        models.add(name, directory)
    return models


def adapter_folders(adapters: Sequence[str]) -> dict[str, Path]:
    """The folders of adapters given as DIR, which has the folder's name, or as NAME=DIR.

    Raises:
        ValueError: a name is taken or none.
    """
    folders: dict[str, Path] = {}
    for text in adapters:
        name, equals, path = text.partition("=")
        directory = Path(path if equals and not Path(text).is_dir() else text)
        if not equals or Path(text).is_dir():
            name = directory.resolve().name
        if not _NAME.fullmatch(name):
            raise ValueError(f"--adapter {text}: {name!r} is no name for a model; write it as NAME={directory}")
        if name in folders or name in (BASE, MERGED):
            raise ValueError(f"--adapter {text}: the name {name} is taken; give another, as NAME={directory}")
        folders[name] = directory
    return folders


def load_layers(model: nn.Module, directory: Path) -> adapter.Layers:
    """Load the layers of an adapter, of any format that is read, for a bare model, which stays bare.

    Raises:
        ValueError: it does not fit the model.
    """
    try:
        adapter.put(model, find.read(directory, model=model))
        model.eval()  # the new layers as well: no dropout
        mx.eval(adapter.weights(model))
    except BaseException:
        adapter.take_off(model)
        raise
    return adapter.take_off(model)


def _open(directory: Path, settings: schema.Params, *, name: str) -> Models:
    trust = settings.model.trust_remote_code
    prompts = Prompts.under(settings, load_tokenizer(directory, trust_remote_code=trust))
    model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
    decoder = load_decoder(directory, config, chat_template=settings.tokenize.chat_template, trust_remote_code=trust)
    text = config.get("text_config") or config
    return Models(model, decoder, prompts, name=name, context_tokens=text.get("max_position_embeddings"))
