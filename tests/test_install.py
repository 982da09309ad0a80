"""The wheel, and the decoders of another package: built from the tree, installed apart from it, and used from another
folder; and the page on how to make such a package.
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
    build = tmp_path_factory.mktemp("build")
    tree = build / "tree"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(build), str(tree))
    (wheel,) = build.glob("prunehal-*.whl")
    pip("install", "-q", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def run(site, cwd, *words):
    path = os.pathsep.join([*(f"{part}/bin" for part in str(site).split(os.pathsep)), os.environ["PATH"]])
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(list(words), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_wheel_runs_from_any_folder(site, tmp_path):
    where = run(
        site,
        tmp_path,
        sys.executable,
        "-c",
        "import experiments, decoders; print(experiments.__path__[0], decoders.__path__[0])",
    )
    assert where.stdout.split() == [f"{site}/experiments", f"{site}/decoders"]
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
    wrong = run(site, tmp_path, "prunehal", "decoder=[prunhal]")
    assert wrong.returncode == 2 and "Did you mean 'prunehal'" in wrong.stderr
    study = run(site, tmp_path, "prunehal", "experiment=ranking", "dry_run=true")
    assert study.returncode == 0 and "500 of 500 to do" in study.stdout


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
    both = f"{site}{os.pathsep}{plugin}"
    out = {}
    for line in shell_lines(PAGE.read_text())[1:]:
        done = run(both, tmp_path, *shlex.split(line))
        assert done.returncode == 0, done.stderr
        out[line] = done.stdout
    help_text = next(v for k, v in out.items() if "--help" in k)
    assert re.search(r"decoder: .*ritual.*spotlight", help_text)
    assert any("[ritual,prunehal] - []" in v for v in out.values())
    wrong = run(both, tmp_path, "prunehal", "decoder=[spotligt]")
    assert wrong.returncode == 2 and "Did you mean 'spotlight'" in wrong.stderr
    refused = run(both, tmp_path, "prunehal", "decoder=[ritual]", "decoder.ritual.alpha=-1", "task.count=1")
    assert refused.returncode == 2
    assert "ritual: alpha is a number >= 0, not -1; the nearest valid value is 0" in refused.stderr
    assert "captions" not in refused.stdout + refused.stderr


def test_decoders_of_an_installed_package_act_in_the_main_program(plugin, tmp_path):
    """`python run.py`, in this tree: at each setting that is not neutral, the same stack says something else."""
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
    done = run(plugin, ROOT, sys.executable, "run.py", *words)
    assert done.returncode == 0, done.stderr
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
