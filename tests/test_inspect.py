"""inspect: what of a row is learned, for the eye."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from stages.cli import console
from stages.fetch import fetch
from stages.inspect import inspect
from stages.prepare import prepare
from stages.tokenize import tokenize
from tests.support.tokenizers import CHATML

TALK = [{"role": role, "content": f"{role[0]}{i} 한"} for i in range(3) for role in ("user", "assistant")]
ROWS = [{"text": "short"}, {"text": "the longest of all rows"}, {"text": "bell\x07"}]
TOKENS = Path("data/tokens/train.parquet")


def make(rows: list[object], *sets: str) -> None:
    Path("raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare([Path("raw.jsonl")], overrides=["prepare.valid_fraction=0.0", "prepare.test_fraction=0.0"])
    tokenize(overrides=list(sets))


@pytest.fixture(autouse=True)
def base_model(project: Path) -> None:
    fetch()


def test_all_answers_of_a_conversation_are_shown_as_learned(capsys: pytest.CaptureFixture[str]) -> None:
    make([{"messages": TALK}], f"tokenize.chat_template={json.dumps(CHATML)}")
    capsys.readouterr()
    inspect(TOKENS)
    shown = capsys.readouterr().out
    for i in range(3):
        assert f"«a{i} 한<|im_end|>" in shown
        assert f"u{i} 한<|im_end|>" in shown
        assert f"«u{i}" not in shown


def test_control_tokens_that_are_only_text_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    make([{"prompt": "q", "completion": "a<|pad|>b"}, {"prompt": "q", "completion": "a"}])
    capsys.readouterr()
    inspect(TOKENS)
    assert "control tokens that are only text │ 1" in " ".join(capsys.readouterr().out.split())
    inspect(TOKENS, row=1)
    assert "only text" not in capsys.readouterr().out


def test_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make([{"prompt": "q", "completion": "a"}])
    monkeypatch.setattr(console, "out", Console(force_terminal=True, color_system="standard", highlight=False))
    capsys.readouterr()
    inspect(TOKENS)
    shown = capsys.readouterr().out
    assert "\x1b[2mq\x1b[0m" in shown
    assert "\x1b[30;102ma\x1b[0m" in shown


def test_the_row_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    make(list(ROWS))
    capsys.readouterr()
    inspect(TOKENS, row=2)
    assert "ell␇<|end|>»" in capsys.readouterr().out
    inspect(TOKENS, longest=True)
    assert "Row 1 of 3" in capsys.readouterr().out
    inspect(TOKENS, random=True)
    assert " of 3, id " in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no row 3; its rows are 0 to 2"):
        inspect(TOKENS, row=3)


def test_files_that_are_no_token_files() -> None:
    with pytest.raises(ValueError, match=r"no such file; make it with: python -m stages\.tokenize"):
        inspect(TOKENS)
    Path("a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a Parquet file"):
        inspect(Path("a.parquet"))
