"""The wheel, and the decoders of another package: built from the tree, installed apart from it, and used from another
folder; and the page on how to make such a package.

Two commands here are processes of their own. The others are forks of one that has imported everything, since imports
cost most of a short run.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from decoders import AttentionView, Branch, Decoder, Edits, ForwardView, RawInputs, Requirements

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/writing-a-decoder.md"
PLUGIN = ROOT / "examples/plugin"


def pip(*words, **more):
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    tree = tmp_path_factory.mktemp("build") / "tree"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    pip("install", "-q", "--no-deps", "--no-build-isolation", "--target", str(folder), str(tree))
    return folder


def environment(site):
    path = os.pathsep.join([*(f"{part}/bin" for part in str(site).split(os.pathsep)), os.environ["PATH"]])
    own = {"PYTHONPATH": str(site), "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def run(site, cwd, *words):
    """A command in a process of its own."""
    return subprocess.run(list(words), cwd=cwd, env=environment(site), capture_output=True, text=True, timeout=300)


FORKS = """
import json, os, sys
import decoders, experiments
from experiments.cli import job, main, study
print(experiments.__path__[0], decoders.__path__[0])
for number, words in enumerate(json.load(sys.stdin)):
    sys.stdout.flush()
    if not (process := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(f"{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, code = words, 70
        try:
            main.command()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def run_forked(site, cwd, *lines):
    """What `prunehal` does with each line of words, one after the other; first where it was imported from."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([["prunehal", *words] for words in lines]),
        cwd=cwd,
        env=environment(site),
        capture_output=True,
        text=True,
        timeout=600,
    )
    where, *codes = done.stdout.splitlines()
    assert len(codes) == len(lines), done.stderr
    said = [[(cwd / f"{number}.{stream}").read_text() for stream in (1, 2)] for number in range(len(lines))]
    return where.split(), [
        subprocess.CompletedProcess(words, int(code), *told)
        for words, code, told in zip(lines, codes, said, strict=True)
    ]


def test_the_wheel_runs_from_any_folder(site, tmp_path):
    done = run(
        site,
        tmp_path,
        "prunehal",
        "task.count=1",
        "max_new_tokens=6",
        "decoder=[opera,prunehal]",
        "search=beam",
        "hydra.run.dir=here",
    )
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["stack"] for line in (tmp_path / "here/captions.jsonl").read_text().splitlines()} == {
        "[]",
        "[opera,prunehal]",
    }
    assert (tmp_path / "outputs/results.sqlite").exists() and "CHAIR_S" in done.stdout
    where, (study,) = run_forked(site, tmp_path, ["experiment=failures", "dry_run=true", "task.count=30"])
    assert where == [f"{site}/experiments", f"{site}/decoders"]
    assert study.returncode == 0 and study.stdout.count("30 of 30 to do") == 2


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A folder with the example package, installed by the page's command, and nothing else."""
    folder, tree = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("tree")
    shutil.copytree(PLUGIN, tree / "examples/plugin", ignore=shutil.ignore_patterns("__pycache__"))
    install = next(line for line in shell_lines(PAGE.read_text()) if line.startswith("pip install "))
    pip(*shlex.split(install)[1:], "-q", "--target", str(folder), cwd=tree)
    return folder


def quoted(text):
    """(file, lines) of each block of a page under a line that names its file."""
    return re.findall(r"^`([^`\n]+)`\n\n```\w+\n(.*?)^```$", text, re.M | re.S)


def shell_lines(text):
    return [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]


def test_the_page_quotes_the_example_package():
    text = PAGE.read_text()
    found = quoted(text)
    assert len(found) == len(re.findall(r"^```(?:python|yaml|toml)$", text, re.M)) > 5
    for name, lines in found:
        code = (PLUGIN / name).read_text()
        for part in lines.strip().split("\n\n\n"):  # what stands alone on the page may be a method
            assert f"{part}\n" in code or f"{textwrap.indent(part, '    ')}\n" in code, (name, part)
    assert re.findall(r"^## (\d)\.", text, re.M) == list("123456") and text.startswith(
        "# A decoder of your own, in six"
    )


def test_the_page_names_all_that_a_decoder_can_do():
    spans = {re.match(r"\w*", span.removeprefix("Step.").removeprefix("Branch."))[0] for span in spans_of_page()}
    both = {name for one in (ForwardView, AttentionView) for name in (*one.__annotations__, *vars(one))}
    names = both | {name for one in (Decoder, RawInputs) for name in vars(one)}
    names |= {field.name for one in (Branch, Edits, Requirements) for field in dataclasses.fields(one)} | {"exported"}
    assert len(names) > 60
    assert {name for name in names if not name.startswith("_")} - spans == set()


def spans_of_page():
    """What stands between backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.M | re.S))


def test_the_commands_of_the_page(site, plugin, tmp_path):
    """With the wheel, from a folder that holds nothing."""
    before = run(site, tmp_path, "prunehal", "decoder=[spotlight]")
    assert before.returncode == 2 and "spotlight" not in before.stderr.split("Valid: avisc")[1]
    lines = [shlex.split(line) for line in shell_lines(PAGE.read_text())[1:]]
    assert {program for program, *_ in lines} == {"prunehal"}
    _, (*told, wrong, refused) = run_forked(
        f"{site}{os.pathsep}{plugin}",
        tmp_path,
        *(words for _, *words in lines),
        ["decoder=[spotligt]"],
        ["decoder=[ritual]", "decoder.ritual.alpha=-1", "task.count=1"],
    )
    assert [done.returncode for done in told] == [0] * len(lines), [done.stderr for done in told]
    help_text = next(done.stdout for done in told if done.args == ["--help"])
    assert re.search(r"decoder: .*ritual.*spotlight", help_text)
    assert any("[ritual,prunehal] - []" in done.stdout for done in told)
    assert wrong.returncode == 2 and "Did you mean 'spotlight'" in wrong.stderr
    assert refused.returncode == 2
    assert "ritual: alpha is a number >= 0, not -1; the nearest valid value is 0" in refused.stderr
    assert "captions" not in refused.stdout + refused.stderr


@pytest.fixture
def installed(plugin, monkeypatch):
    """The example package, as installed, in this process."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "example_decoders"]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(plugin)
    yield plugin
    forget()


def test_decoders_of_an_installed_package_act_in_the_main_program(installed, run_here, tmp_path):
    """At each setting that is not neutral, the same stack says something else."""
    words = (
        "-m",
        "decoder=[ritual,spotlight,prunehal]",
        "decoder.ritual.alpha=0,3",
        "decoder.ritual.view=upside_down",
        "decoder.spotlight.boost=0,3",
        "compare=false",
        "task.count=2",
        "max_new_tokens=24",
        f"hydra.sweep.dir={tmp_path}",
        f"results={tmp_path}/results.sqlite",
    )
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    assert sys.modules["example_decoders"].__file__.startswith(str(installed))
    told = [list(map(json.loads, (tmp_path / job / "captions.jsonl").read_text().splitlines())) for job in "0123"]
    assert all({row["stack"] for row in rows} == {"[ritual,spotlight,prunehal]"} for rows in told)
    neutral, spotlight, ritual, both = ([row["caption"] for row in rows] for rows in told)
    assert len(neutral) == 2 and all(neutral)
    assert spotlight != neutral and ritual != neutral and both != neutral
    assert all(row["prunes"] for row in told[0])


def test_a_broken_entry_point_is_named(site, tmp_path):
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info/entry_points.txt").write_text("[prunehal.conf]\nbroken = no_such_package.conf\n")
    done = run(f"{site}{os.pathsep}{tmp_path}", tmp_path, "prunehal", "decoder=[prunehal]")
    assert (
        done.returncode == 2 and "the entry point 'broken' of prunehal.conf names 'no_such_package.conf'" in done.stderr
    )
