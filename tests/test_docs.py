"""README and the pages of docs/: their commands are understood, their Python runs, their links lead somewhere, and the
reference holds every public name.

Nothing is run but the Python: a command's words are checked as the command itself checks them, and no further.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import torch

import baselines
import decoders
from experiments import models
from experiments.cli import arguments
from experiments.scenes import world

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "experiments/scenes/README.md"]
PAGES += sorted(page for page in DOCS.rglob("*.md") if not page.name.endswith(".in.md"))
CODE = re.compile(r"^```.*?^```$", re.M | re.S)
FOREIGN = {  # commands and modules that are not ours to check
    *("apt-get", "kill", "optuna", "scancel", "scontrol", "served/bin/mlflow", "squeue", "tail", "wait"),
    *("lmms_eval", "nbconvert", "pytest", "venv"),
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """The words of every command in blocks of shell, and of our modules' commands within sentences and tables."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python -m experiments\.[^`]+|make \w[^`]*)`", CODE.sub("", text))
    parts = [part for line in lines for part in re.split(r" && | & | &$", re.sub(r"(^|\s+)#.*", "", line)) if part]
    for part in parts:
        words = shlex.split(part)
        while words and (words[0] == "export" or re.match(r"[A-Z_]+=", words[0])):
            words = words[1:]
        if words:
            yield words


class Understood(BaseException):
    """Raised where a command's words have been read."""


def _understands(module, words, monkeypatch):
    """A command's own parser takes the words; what follows is not run. One without a parser takes none."""
    main = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    if "parse_args(" not in Path(importlib.util.find_spec(main).origin).read_text():
        assert words == []
        return
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        read(self, args, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.delitem(sys.modules, main, raising=False)
    with pytest.raises(Understood):
        runpy.run_module(module, run_name="__main__")
    monkeypatch.undo()


def _check(words, monkeypatch):
    program, *rest = words
    if re.fullmatch(r"(.*/)?python3?", program):
        program, *rest = rest[1:] if rest[0] == "-m" else rest
    if program in ("run.py", "prunehal"):
        if rest != ["--help"]:
            monkeypatch.setattr(arguments.shutil, "which", lambda name: name)  # Slurm need not be on this machine
            arguments.check(arguments.ordered(rest), writes=False)
    elif program.startswith("experiments."):
        _understands(program, rest, monkeypatch)
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        assert rest[0] in targets, rest[0]
    elif re.fullmatch(r"(.*/)?pip", program):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in rest for name in re.findall(r"^\.\[(.*)\]$", word)]
        assert (
            rest[0] == "install" and {part for name in named for part in name.split(",")} - {*extras, "NAME"} == set()
        )
    elif program.endswith(".py"):
        assert (ROOT / program).is_file(), program
    else:
        assert program in FOREIGN, words
        assert [word for word in rest if re.match(r"tests/|docs/", word) and not (ROOT / word).exists()] == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "writing-a-decoder.md"],  # which test_install.py runs
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_are_understood(page, monkeypatch):
    for words in commands(page.read_text()):
        try:
            _check(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}: {shlex.join(words)}") from error


def test_a_command_that_is_wrong_is_noticed(monkeypatch):
    text = "```bash\npython run.py decoder=[prunhal]\nmake tests\nsudo true\npip install '.[sweep]'\n```\n"
    text += "Say `python -m experiments.results shows` or `python -m experiments.report --ouT x y`.\n"
    found = list(commands(text))
    assert len(found) == 6
    for words in found:
        with pytest.raises((Exception, SystemExit)):
            _check(words, monkeypatch)
        monkeypatch.undo()


def test_readme_begins_with_the_commands_that_others_call():
    text = (ROOT / "README.md").read_text()
    assert [block.strip() for block in blocks(text, "bash")[:3]] == ["make run", "make test", "make lint"]
    assert len(text.splitlines()) < 120


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model's folder, and a photo of one of its scenes."""
    photo = tmp_path_factory.mktemp("docs") / "photo.jpg"
    world.render(world.draw("validation", "typical", 0)).save(photo)
    return models.ROOT / models.entry("scenes").path, photo


def test_the_example_of_the_readme_runs(embedded, capsys):
    """On the embedded model, which takes the place of LLaVA-1.5, on a CPU."""
    folder, photo = embedded
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    for theirs, ours in (
        ("llava-hf/llava-1.5-7b-hf", str(folder)),
        ("photo.jpg", str(photo)),
        ("cuda", "cpu"),
        ("float16", "float32"),
        ("=512", "=12"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    assert len(code.splitlines()) <= 12
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    (row,) = found["stack"].record["prunehal"]
    assert row["prunes"] and found["ids"].shape[1] > 12 and capsys.readouterr().out.strip()


def test_the_examples_of_the_library_run(embedded):
    """One after the other, on the embedded model; the second turn answers after the first."""
    config = models.entry("scenes")
    model, processor = models.load(config)
    inputs = models.encode(processor, [world.render(world.draw("validation", "typical", 0))], config.prompt, "cpu")
    question = processor.tokenizer(" Is there a dog?", return_tensors="pt").input_ids
    found = {"model": model, "inputs": inputs, "torch": torch, "question_ids": question}
    code = blocks((DOCS / "library.md").read_text(), "python")
    assert len(code) == 2 and all("=512" in part for part in code)
    for part in code:
        exec(compile(part.replace("=512", "=12"), "library.md", "exec"), found)
    assert found["ids"].shape[1] > found["out"].sequences.shape[1] + question.shape[1]


def _anchors(page):
    """Those that GitHub and mkdocs make of a page's titles."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", title)).lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text())
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            wrong.append(target)
    assert wrong == []


def test_the_tutorial_runs(monkeypatch):
    """Cell by cell, without an error; what the committed notebook shows is of the same kinds, and small."""
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    file = DOCS / "tutorial.ipynb"
    committed = nbformat.read(file, as_version=4)
    notebook = nbformat.from_dict(committed)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[], execution_count=None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    kinds = [
        [[output.output_type for output in cell.get("outputs", [])] for cell in nb.cells]
        for nb in (notebook, committed)
    ]
    assert kinds[0] == kinds[1] and sum(map(len, kinds[0])) > 8
    assert file.stat().st_size < 400_000


def _pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(
        line.partition(";")[0].strip().lower().replace("_", "-").split("==") for line in lines if line[0] != "#"
    )


def test_the_lock_of_the_docs_agrees_with_the_others():
    docs = _pins("requirements-docs.lock")
    for other in map(_pins, ("requirements.lock", "requirements-test.lock", "requirements-lint.lock")):
        both = docs.keys() & other.keys()
        assert {name: docs[name] for name in both} == {name: other[name] for name in both}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    assert [name for name in (re.split(r"[\[<>=]", line)[0] for line in extra) if name not in docs] == []


def test_the_page_on_the_architecture_names_every_file_of_the_loop():
    text = (DOCS / "architecture.md").read_text()
    files = {file.name for file in (ROOT / "decoders").glob("*.py")} - {"__init__.py"}
    assert len(files) > 20 and {name for name in files if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("package", [decoders, baselines], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    text = (DOCS / f"reference/{package.__name__}.md").read_text()
    named = re.findall(r"^::: ([\w.]+)$", text, re.M)
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(package.__all__)
    for name in named:
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last) is getattr(package, last)
