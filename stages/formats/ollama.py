"""An Ollama Modelfile for an exported model: where the GGUF is, how turns are written, and where an answer ends.

Source: Ollama's Modelfile reference and its templates (Go's text/template).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base.manifest import check_complete
from stages.files.outputs import read_json, write_text
from stages.formats.gguf_tokenizer import generation_config, stop_ids
from stages.formats.turns import TurnForm, find_form
from stages.schemas.template import Template
from stages.templating.tokenizer import TextTokenizer, load_tokenizer

_QUOTES = '"""'


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says: its TEMPLATE (None: Ollama takes the GGUF's own), and the texts that end an answer."""

    template: str | None
    stops: tuple[str, ...]


def write_modelfile(
    out_file: Path,
    model_dir: Path,
    *,
    gguf: str,
    adapter: str | None = None,
    template: str | None = None,
    date: str = "2026-01-01",
) -> Modelfile:
    """Write a Modelfile: `ollama create NAME -f Modelfile` makes a model of it.

    `model_dir` has the tokenizer; `gguf` and `adapter` are the files' places as seen from the Modelfile. `template`:
    `prepare.template` of the parameters, where the rows were trained in one; None: the chat template,
    with `date` as its today: the day that the rows were written with (`tokenize.date`).

    Raises:
        ValueError: the directory is not whole, or the template is none.
    """
    check_complete(model_dir)
    tokenizer = load_tokenizer(model_dir)
    config = generation_config(model_dir, read_json(model_dir / "config.json", "take a whole copy"))
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids(tokenizer, config) if i < len(tokenizer)]
    go, remark = _plain(template) if template is not None else _by_turns(tokenizer, date)
    if go is not None and _QUOTES in go:
        go, remark = None, 'The template holds """, which a Modelfile cannot hold: TEMPLATE is left to you.'
    lines = [f"FROM {_local(gguf)}", *([f"ADAPTER {_local(adapter)}"] if adapter else []), ""]
    lines += [f"# {remark}"] if remark else []
    lines += [f"TEMPLATE {_QUOTES}{go}{_QUOTES}"] if go is not None else []
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    write_text(out_file, "\n".join(lines) + "\n")
    return Modelfile(go, tuple(stops))


def _local(name: str) -> str:
    """A file's place in a form that Ollama does not take for a model of its library."""
    return name if name.startswith(("/", "./", "../")) else f"./{name}"


def _quoted(text: str) -> str:
    return _QUOTES + text + _QUOTES if '"' in text else f'"{text}"'


def _plain(text: str) -> tuple[str | None, str | None]:
    """The Go template of a text template with one column before the answer, or a remark on why there is none."""
    parsed = Template(text)
    columns = [name for name in dict.fromkeys(parsed.columns[:-1]) if name not in parsed.optional]
    if len(columns) != 1:
        return None, f"prepare.template has {len(columns)} columns before its answer, Ollama one prompt: no TEMPLATE."
    mark = "ProbeColumn"
    before = parsed.prompt({columns[0]: mark}).split(mark)
    return "{{ .Prompt }}".join(map(_escaped, before)) + "{{ .Response }}", None


def _by_turns(tokenizer: Any, date: str) -> tuple[str | None, str | None]:
    """The Go template that writes turns as the chat template does, or a remark on why there is none."""
    if not tokenizer.chat_template:
        return None, "The tokenizer has no chat template: Ollama continues the text that it is given."
    form = find_form(tokenizer, adds_bos=TextTokenizer(tokenizer).prefix > 0, date=date)
    if form is None:
        return None, "The chat template has no plain form in Go: Ollama reads the one inside of the GGUF."
    return go_template(form), None


def go_template(form: TurnForm) -> str:
    """The form of turns as a template of Ollama's."""
    system, start, inside = form.system, _escaped(form.start), ""
    if system is not None and system.inside_user:
        start += "{{ $system := .System }}"
        inside = "{{ if $system }}{{ $system }}" + _escaped(system.close) + '{{ $system = "" }}{{ end }}'
    elif system is not None:
        given = _escaped(system.open) + "{{ .System }}" + _escaped(system.close)
        start = "{{ if .System }}" + given + ("{{ else }}" + start if start else "") + "{{ end }}"
    user = _escaped(form.user_open) + inside + "{{ .Content }}" + _escaped(form.ask)
    answer = "{{ .Content }}" + _escaped(form.answer_close)
    turns = '{{ if eq .Role "user" }}' + user + '{{ else if eq .Role "assistant" }}' + answer + "{{ end }}"
    return start + "{{ range .Messages }}" + turns + "{{ end }}"


def _escaped(text: str) -> str:
    """Text that a Go template writes as it is."""
    return '{{ "{{" }}'.join(text.split("{{"))
