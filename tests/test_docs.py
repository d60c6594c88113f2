"""What the documentation says can be typed, followed and run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from peftlab.cli import main
from peftlab.experiment.library import find_all, names
from peftlab.experiment.resolve import resolve
from peftlab.methods import METHODS
from peftlab.models.embedded import embedded_models
from peftlab.models.tiny import tiny_config
from peftlab.results.build import build_comparison
from peftlab.results.comparison import Cell

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
OWN_NAMES = {"intents", "my-task", "my-lora", "norm-tuning"}
"""Recipes and tasks that a page has its reader write."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_ENDS_COMMAND = {"|", "||", "&&", ";", ">"}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def commands_of(text: str) -> Iterator[list[str]]:
    """The arguments of every ``peftlab`` command in a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            module = word == "peftlab" and words[max(at - 1, 0)] == "-m"
            first = at == 0 or words[at - 1] in _ENDS_COMMAND
            if module or (first and Path(word).name == "peftlab"):
                rest = words[at + 1 :]
                end = next((i for i, w in enumerate(rest) if w in _ENDS_COMMAND), len(rest))
                yield rest[:end]
                break


def documented_commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        spans = re.findall(r"`(peftlab [^`]+)`", _FENCE.sub("", text))
        for block in ("\n".join(blocks(page, "sh")), "\n".join(" ".join(s.split()) for s in spans)):
            for arguments in commands_of(block):
                yield shown(page), arguments
    for recipe in RECIPES:
        for line in re.findall(r"^# Run: +(.+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE):
            for arguments in commands_of(line):
                yield shown(recipe), arguments
    for arguments in commands_of((ROOT / "Makefile").read_text(encoding="utf-8")):
        yield "Makefile", arguments


COMMANDS = list(documented_commands())


@pytest.fixture
def absent_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that a command line names need not be there to be parsed."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))


@pytest.mark.usefixtures("absent_files")
@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page}-{shlex.join(args)}" for page, args in COMMANDS]
)
def test_every_command_parses(page: str, arguments: list[str]) -> None:
    group = click.Context(main, info_name="peftlab")
    name, command, rest = main.resolve_command(group, arguments)
    assert name is not None
    assert command is not None
    if not rest:
        # A page that speaks of a command types nothing.
        return
    context = command.make_context(name, list(rest), parent=group)
    parameters = context.params
    if name in ("train", "compare", "show", "validate", "cp"):
        known = {*names("methods"), *names("tasks"), *OWN_NAMES}
        recipes = parameters.get("recipes") or [parameters.get("recipe")]
        named = [parameters.get("task"), parameters.get("name"), *recipes]
        named += parameters.get("names") or ()
        assert {str(each) for each in named if each} <= known


def test_commands_are_found_where_they_are() -> None:
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "Makefile", *map(shown, RECIPES)} <= pages
    assert list(commands_of("FOO=1 torchrun -m peftlab ls | grep x\n# peftlab train")) == [["ls"]]


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_relative_links_resolve(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def listed(heading: str) -> set[str]:
    """The names in the first column of the README's list with these first headings."""
    text = README.read_text(encoding="utf-8")
    table = re.search(rf"^\| {heading} \|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None
    return set(re.findall(r"^\| `([^`]+)` \|", table[1], re.MULTILINE))


def test_readme_names_every_shipped_recipe_task_and_model() -> None:
    assert listed(r"recipe \| what trains") == {
        path.stem for path in RECIPES if path.parent.name == "methods"
    }
    assert listed(r"task \| kind") == {path.stem for path in RECIPES if path.parent.name == "tasks"}
    assert listed(r"model \| what it is") == set(embedded_models())


@pytest.mark.parametrize("kind", METHODS.names)
def test_every_method_has_a_page_with_its_keys_and_recipes(kind: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{kind}.md").read_text(encoding="utf-8")
    keys = set(METHODS.get(kind).Config.model_fields) - {"kind"}
    recipes = {
        entry.name for entry in find_all("methods") if entry.layer.data["method"]["kind"] == kind
    }
    assert keys | recipes <= set(re.findall(r"`([\w-]+)(?:: [^`]*)?`", text))


@pytest.mark.parametrize("recipe", RECIPES, ids=shown)
def test_every_recipe_has_a_run_line(recipe: Path) -> None:
    lines = [args for page, args in COMMANDS if page == shown(recipe)]
    assert lines
    assert all(recipe.stem in " ".join(arguments) for arguments in lines)


def test_the_readmes_task_resolves(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "yaml") if "\nkind: " in block]
    task = tmp_path / "intents.yaml"
    task.write_text(text, encoding="utf-8")
    experiment = resolve(str(task), "lora").experiment
    assert (experiment.kind, experiment.model.model_name_or_path) == ("classification", "minilm")


def test_the_readmes_method_trains_what_it_says() -> None:
    from transformers import AutoModelForSequenceClassification

    (code,) = [block for block in blocks(README, "python") if "METHOD = " in block]
    (text,) = [block for block in blocks(README, "yaml") if "norm_tuning" in block]
    module = types.ModuleType("norm_tuning")
    # pydantic looks a model's annotations up in its module.
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, shown(README), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    section = YAML(typ="safe").load(text)["method"]
    method = module.METHOD(module.METHOD.Config.model_validate(section))
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    trained = [
        name
        for name, parameter in method.attach(model).named_parameters()
        if parameter.requires_grad
    ]
    assert {"LayerNorm" in name or name.startswith("classifier.") for name in trained} == {True}
    assert len(trained) == 2 * (1 + 2 * 3) + 2


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            assert compile(block, shown(page), "exec").co_names


def readme_table() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(
        "readme_table", ROOT / "benchmarks" / "readme_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(recipe: str, accuracy: float) -> Cell:
    return Cell(
        identity=recipe,
        task="x",
        recipe=recipe,
        model="bert-tiny",
        seed=0,
        status="ok",
        metric="accuracy",
        metrics={"accuracy": accuracy},
    )


def test_the_readmes_table_is_rewritten_between_its_markers() -> None:
    script = readme_table()
    cells = [cell("full", 0.9), cell("lora", 0.8)]
    section = script.describe(build_comparison(cells, command="peftlab compare x"), "a box", 75.2)
    text = README.read_text(encoding="utf-8")
    once = script.replaced(text, section)
    assert "peftlab compare x" in once
    assert "Run on a box" in once
    assert "| lora |" in once
    assert script.replaced(once, section) == once
    assert once.startswith(text.partition(script.BEGIN)[0])
    assert once.endswith(text.partition(script.END)[2])
    with pytest.raises(SystemExit, match="markers"):
        script.replaced("no markers", section)
