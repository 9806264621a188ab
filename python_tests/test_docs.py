"""The documentation says what is so: its Python runs, its commands exist, its links lead somewhere.

What a page shows is run as it stands, page by page, in an empty folder. `path/to/...` stands for what a reader has and
this machine has not: there names are checked and nothing is run. So it is with a command whose comment says minutes.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

import taps_ext as taps
from taps_ext import cli
from taps_ext.composition import COMPOSITIONS
from taps_ext.evaluation.tasks import TASKS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))

import step_picture

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Run from first to last: the Python, and the commands.
PYTHON = ("quickstart.md", "your-models.md", "training.md", "how-it-works.md", "ops.md", "extending.md")
COMMANDS = ("quickstart.md", "your-models.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
ELSEWHERE = "path/to/"
WRITTEN = {"report.md"}  # by commands, not pages
OF_OTHER_PROGRAMS = {"--backend", "--cases", "--long", "--no-build-isolation"}
KNOWN = {"taps": taps, "decoder": taps.SpeculativeDecoder}  # what pages call so


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line
    language: str
    text: str
    output: str | None  # the `text` block right behind it

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"

    @property
    def is_session(self) -> bool:
        return self.text.startswith(">>> ")

    @property
    def is_elsewhere(self) -> bool:
        """Whether it needs what only the reader has; a comment may name it."""
        nodes = () if self.is_session else ast.walk(ast.parse(self.text))
        return any(isinstance(node, ast.Constant) and ELSEWHERE in str(node.value) for node in nodes)


@dataclass(frozen=True)
class Command:
    """A use of `taps-ext`, its words behind the program's name."""

    place: str
    words: tuple[str, ...]
    is_whole: bool  # a line to be typed, not a mention in a sentence
    takes_minutes: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    outputs = {one.start(): one[2] for one in found if one[1] == "text"}
    return [
        Block(page, text[: one.start(2)].count("\n") + 1, one[1], one[2], outputs.get(one.end() + 1)) for one in found
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: Path) -> Iterator[Command]:
    """Every use of `taps-ext` on a page: of whole lines, those that other programs start too."""
    for block in blocks(page):
        if block.language in ("", "bash", "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if start := re.search(r"^(?:taps-ext|.* -m taps_ext) ", line):
                    words = shlex.split(re.sub(r"\[(--[\w-]+)\]", r"\1", line[start.end() :]), comments=True)
                    yield Command(str(block), tuple(words), True, "minute" in line.partition("#")[2])
    for mention in inline_code(page):
        if mention.startswith("taps-ext "):
            yield Command(page.name, tuple(mention.split()[1:]), False)
        elif mention.split()[0] in of_the_command_line() and " --" in mention:
            yield Command(page.name, tuple(mention.split()), False)


def inline_code(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


@cache
def of_the_command_line() -> dict[str, Any]:
    """The commands by name, as click has them."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def options(command: str) -> set[str]:
    return {name for parameter in of_the_command_line()[command].params for name in parameter.opts} | {"--help"}


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page is run; what it registers is gone after it."""
    monkeypatch.chdir(tmp_path)
    kept = [(registry, dict(registry)) for registry in (COMPOSITIONS, TASKS)]
    yield tmp_path
    for registry, before in kept:
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


# ---- Python


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    found = [block for block in python_blocks(DOCS / name) if not block.is_elsewhere]
    assert found, f"{name} shows no Python that runs"
    for block in found:
        if block.is_session:
            run_session(block, namespace)
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
        capsys.readouterr()
        exec(code, namespace)
        assert capsys.readouterr().out.rstrip() == (block.output or "").rstrip(), str(block)


def run_session(block: Block, namespace: dict[str, Any]) -> None:
    """`>>>` lines and what they print."""
    test = doctest.DocTestParser().get_doctest(block.text, namespace, str(block), str(block.page), block.line - 1)
    said: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    namespace.update(test.globs)
    assert results.failed == 0, "".join(said)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_that_is_not_run_names_what_there_is(page: Path) -> None:
    for block in python_blocks(page):
        if block.is_session:
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in KNOWN:
                is_attribute = node.value.id == "decoder" and node.attr in ("drafters", "target")
                assert is_attribute or hasattr(KNOWN[node.value.id], node.attr), f"{block}: {ast.unparse(node)}"
            if isinstance(node, ast.Call):
                assert not unknown_keywords(node), f"{block}: {ast.unparse(node)}"


def unknown_keywords(call: ast.Call) -> set[str]:
    """The keywords of a call of ours that its function does not have."""
    place = call.func
    if not (isinstance(place, ast.Attribute) and isinstance(place.value, ast.Name) and place.value.id in KNOWN):
        return set()
    parameters = inspect.signature(getattr(KNOWN[place.value.id], place.attr)).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return set()
    return {keyword.arg for keyword in call.keywords if keyword.arg} - parameters.keys()


# ---- commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    for command in commands(page):
        name, *words = command.words
        assert name in of_the_command_line(), str(command)
        strangers = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} - options(name)
        assert not strangers, f"{command}: {name} has no {', '.join(strangers)}"
        if command.is_whole:
            of_the_command_line()[name].make_context(name, list(words))  # what is missing or of another type raises


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent in (ROOT, DOCS)], ids=name_of)
def test_options_in_sentences_exist(page: Path) -> None:
    known = OF_OTHER_PROGRAMS.union(*map(options, of_the_command_line()))
    named = {mention.split()[0].partition("=")[0] for mention in inline_code(page) if mention.startswith("--")}
    assert not named - known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipe_keys_on_a_page_exist(page: Path) -> None:
    from taps_ext.training.recipe import load_recipe

    for command in commands(page):
        if command.is_whole and command.words[0] in ("train", "features"):
            given = of_the_command_line()[command.words[0]].make_context("train", list(command.words[1:])).params
            recipes = [ROOT / path for path in given["config"] or () if (ROOT / path).exists()]
            needed = ["target=tiny", "output=x", "data.sources=[x.jsonl]", "training.steps=1"]
            load_recipe(recipes, [*(() if recipes else needed), *(given["overrides"] or ())])


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_of_a_page_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(DOCS / name):
        is_elsewhere = any(ELSEWHERE in word for word in command.words)
        if not command.is_whole or command.takes_minutes or is_elsewhere:
            continue
        with pytest.raises(SystemExit) as exit:
            cli.main(command.words)
        said = capsys.readouterr()
        assert not exit.value.code and said.out, f"{command}: {said.err}"


# ---- what pages refer to


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    lost = [link for link in links if not (page.parent / link).exists()]
    for mention in inline_code(page):
        is_file = re.fullmatch(r"(taps_ext|csrc|python_tests|benchmarks|docs|recipes|tools)/[\w./-]+", mention)
        if is_file and not (ROOT / mention).exists():
            lost.append(mention)
        is_page = re.fullmatch(r"[\w-]+\.md", mention) and mention not in WRITTEN
        if is_page and not any((folder / mention).exists() for folder in (page.parent, ROOT)):
            lost.append(mention)
    assert not lost


def test_the_table_of_pages_has_them_all() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_reader_of_pages_sees_what_they_hold() -> None:
    """All of the above is only as good as this."""
    quick = python_blocks(DOCS / "quickstart.md")
    assert len(quick) > 3 and all(block.output for block in quick)
    [readme, *_] = python_blocks(ROOT / "README.md")
    assert readme.is_elsewhere and not quick[0].is_elsewhere
    found = {command.words[0] for page in PAGES for command in commands(page) if command.is_whole}
    assert {"generate", "demo", "train", "regenerate", "average", "validate", "calibrate", "export"} <= found
    demo = next(command for command in commands(DOCS / "quickstart.md") if command.words[0] == "demo")
    assert demo.takes_minutes
    torchrun = [command for command in commands(ROOT / "README.md") if "recipes/hass.yaml" in command.words]
    assert torchrun and torchrun[0].words[0] == "train"


# ---- the picture of a step


def test_the_picture_is_that_of_a_real_step() -> None:
    step = step_picture.real_step()
    assert step_picture.picture(step) == step_picture.OUTPUT.read_text(encoding="utf-8")
    assert step.num_accepted >= 3
    proposers = {step.nodes[index].proposers for index in step.drawn()[1:]}
    assert proposers == {frozenset({"math"}), frozenset({"chat"}), frozenset({"math", "chat"})}
    for drafter in ("math", "chat"):
        drawn = step.drawn(drafter)
        assert 6 <= len(drawn) - 1 <= 9
        assert all(step.nodes[index].parent in drawn for index in drawn[1:]), "a node hangs in the air"
