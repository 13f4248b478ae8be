"""The documentation says what is there: links, commands, options, parameters, targets of make, messages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML

from docs import make_parameters
from stages import __main__ as commands
from tests.support.imports import MODULES, ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for path in [
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "data" / "README.md",
        ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/**/*.md"),
    ]
)  # fmt: skip
TREE = YAML(typ="rt").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
KEYS = {f"{section}.{key}" for section, part in TREE.items() if isinstance(part, dict) for key in part}
SECTIONS = {key.split(".")[0] for key in KEYS}
FILE_KINDS = {"jsonl", "gguf", "json", "csv", "parquet", "safetensors", "py", "md", "yaml"}


def read(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its code, where a link or a heading is none."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^ {4}.*$", "", read(page), flags=re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, punctuation gone, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        is_page = target.suffix == ".md"
        if not target.exists() or (anchor and not (is_page and anchor in anchors(target.resolve().relative_to(ROOT)))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_every_page_of_docs_is_linked() -> None:
    linked = {
        ((ROOT / page).parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", prose(page))
        if ":" not in link
    }
    assert {page for page in PAGES if page.parts[0] == "docs" and ROOT / page not in linked} == set()


def options() -> dict[str, set[str]]:
    """The options of each command, and under "" those of all commands together."""
    group = typer.main.get_command(commands.app)
    found = {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    return found | {"": {"--help"}}


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """Each `python -m stages …` of a page: the command, and its options."""
    pattern = r"python -m stages(?:[. ]([a-z]+))?([^`\n#|]*)"
    return [(name, re.findall(r"(?<!\S)--[a-z-]+", rest)) for name, rest in re.findall(pattern, read(page))]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = options()
    wrong = [
        f"python -m stages {name} {option}".rstrip()
        for name, used in calls(page)
        for option in [*used, ""]
        if name not in known or (option and option not in known[name])
    ]
    assert wrong == []


def test_the_readme_shows_commands_with_options() -> None:
    """The pattern of the test above finds them."""
    assert ("generate", ["--prompt"]) in calls(Path("README.md")) and ("train", ["--set"]) in calls(Path("README.md"))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_parameters_exist(page: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", read(page)) + re.findall(r"^ {4}.*$", read(page), flags=re.MULTILINE)
    dotted = {name for text in code for name in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_]+)(?![\w./(])", text)}
    ours = {name for name in dotted if name.split(".")[0] in SECTIONS and name.split(".")[1] not in FILE_KINDS}
    assert ours - KEYS == set()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_targets_of_make_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", read(Path("Makefile")), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", read(page), flags=re.MULTILINE)) <= known


def test_the_page_of_parameters_is_current() -> None:
    assert make_parameters.PAGE.read_text(encoding="utf-8") == make_parameters.page(), "run: make docs"


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_parameter_has_a_comment(key: str) -> None:
    section, _, name = key.partition(".")
    assert make_parameters.comment(TREE[section], name)


def strings(path: Path) -> list[str]:
    """The constant parts of all strings in a file, but for docstrings."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, ast.Module)}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and value not in docstrings]


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text = read(Path("docs/troubleshooting.md")).split("## DVC")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(messages) > 60
    known = "\n".join(value for path in MODULES for value in strings(path))
    parts = {part.strip() for message in messages for part in message.split("…")}
    assert {part for part in parts if len(part) > 3 and part not in known} == set()


def test_the_rooms_are_drawn() -> None:
    drawn = read(Path("docs/architecture.md")).split("## The rooms")[1].split("\n## ")[0]
    rooms = {path.parts[1] for path in MODULES if len(path.parts) > 2}
    assert {room for room in rooms if not re.search(rf" {room} {{2,}}\S", drawn)} == set()


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("dvc.yaml", 180)])
def test_what_is_read_first_is_short(name: str, most: int) -> None:
    assert len(read(Path(name)).splitlines()) <= most
