"""Which models answer: the merged one, or the base with adapters, each under a name. Adapters are switched in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from stages.adapters import find
from stages.base.manifest import locate, read_manifest
from stages.decoding.decode import load_decoder
from stages.lora import adapter, adapter_files
from stages.model.load import load_base, require_merged
from stages.params import schema
from stages.prompting.prompts import Prompts
from stages.templating.tokenizer import load_tokenizer

MERGED, BASE = "merged", "base"
_NAME = re.compile(r"[\w.-]+")


class Opened(NamedTuple):
    """A model in memory, and what makes prompts for it; `context_tokens` is the most that it can read and say."""

    model: nn.Module
    decoder: Any
    prompts: Prompts
    context_tokens: int | None


class Models:
    """A base model in memory and the adapters that can be put on it, or the merged model; perhaps both.

    `names` are what can be switched to, the one that was first opened first. `model`, `decoder`, `prompts` and
    `context_tokens` are those of the present one, `name`; the context is None if the config does not say it.
    `base` is the identity of the base's weights, which the adapters must have been trained on; `open_merged` loads
    the merged model.
    """

    def __init__(self, first: Opened, *, name: str, open_merged: Callable[[], Opened], base: str | None = None) -> None:
        self._opened = {name: first}
        self._open_merged = open_merged
        self._layers: dict[str, adapter.Layers] = {name: []}
        self._base = base
        self.name = name
        self.model, self.decoder, self.prompts, self.context_tokens = first

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._layers, *(name for name in self._opened if name not in self._layers))

    @property
    def _first(self) -> Opened:
        return self._opened[self.names[0]]

    def switch(self, name: str) -> None:
        """Let the model be another: no weights are loaded, the base stays where it is.

        Raises:
            ValueError: there is no model of this name.
        """
        if name not in self.names:
            raise ValueError(f"no model {name!r} here; there are: {', '.join(self.names)}")
        if name != self.name:
            if name in self._layers:
                adapter.take_off(self._first.model)
                adapter.put_on(self._first.model, self._layers[name])
            self.model, self.decoder, self.prompts, self.context_tokens = self._opened.get(name, self._first)
            self.name = name

    def add(self, name: str, directory: Path) -> None:
        """Load one more adapter; the model stays what it is.

        Raises:
            ValueError: the name is taken, the model is no base, or the adapter does not fit it or is of another one.
        """
        if self.names[0] == MERGED:
            raise ValueError("an adapter goes onto the base model, and this is the merged one; start with --base")
        if name in self.names:
            raise ValueError(f"{directory}: the name {name} is taken; give another, as NAME={directory}")
        if self._base is not None and find.kind_of(directory) == "mlx":
            adapter_files.check_base(directory, self._base)
        worn = adapter.take_off(self._first.model)
        try:
            self._layers[name] = load_layers(self._first.model, directory)
        finally:
            adapter.put_on(self._first.model, worn)

    def add_merged(self) -> None:
        """Load the merged model beside the base, if it is not there yet; the model stays what it is.

        Raises:
            ValueError: there is no merged model.
        """
        if MERGED not in self.names:
            self._opened[MERGED] = self._open_merged()

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

    def open_merged() -> Opened:
        return _open(require_merged(merged), settings)

    if not base and not named:
        return Models(open_merged(), name=MERGED, open_merged=open_merged)
    known = read_manifest(manifest)
    opened = _open(locate(known), settings)
    models = Models(opened, name=BASE, open_merged=open_merged, base=known.weights_identity)
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


def _open(directory: Path, settings: schema.Params) -> Opened:
    trust = settings.model.trust_remote_code
    prompts = Prompts.under(settings, load_tokenizer(directory, trust_remote_code=trust))
    model, config = load_base(directory, dtype=settings.model.dtype, trust_remote_code=trust)
    decoder = load_decoder(directory, config, chat_template=settings.tokenize.chat_template, trust_remote_code=trust)
    text = config.get("text_config") or config
    return Opened(model, decoder, prompts, text.get("max_position_embeddings"))
