"""The wheel, and a decoder of another package: built from the tree, installed apart from it, and used from another
folder.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ROOT / "tests/foreign"


def pip(*words, **more):
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel and the installed foreign package, and nothing else."""
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


def blocks(text):
    """{file name: its text} and the shell lines of a page of the docs."""
    files = dict(re.findall(r"^`([^`\n]+)`\n\n```\w+\n(.*?)^```$", text, re.M | re.S))
    shell = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    return files, shell


def test_the_steps_for_a_decoder_of_ones_own(site, tmp_path):
    """The page's files are those of the example package; its commands are run."""
    files, shell = blocks((ROOT / "docs/new-decoder.md").read_text())
    names = [
        f.relative_to(FOREIGN).as_posix() for f in FOREIGN.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    ]
    assert sorted(files) == sorted(names)
    package = tmp_path / "package"
    for name, text in files.items():
        assert (FOREIGN / name).read_text() == text
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    before = run(site, tmp_path, "prunehal", "decoder=[shout]")
    assert before.returncode == 2 and "shout" not in before.stderr.split("Valid: avisc")[1]
    install, *commands = shell
    assert install.startswith("pip install ")
    other = tmp_path / "other"  # the package is installed beside ours
    pip(*shlex.split(install)[1:], "-q", "--target", str(other), cwd=package)
    both = f"{site}{os.pathsep}{other}"
    out = {}
    for line in commands:
        done = run(both, tmp_path, *shlex.split(line))
        assert done.returncode == 0, done.stderr
        out[line] = done.stdout
    help_text = next(v for k, v in out.items() if "--help" in k)
    assert re.search(r"decoder: .*shout", help_text)
    assert any("[shout,prunehal] - []" in v for v in out.values())
    wrong = run(both, tmp_path, "prunehal", "decoder=[shot]")
    assert wrong.returncode == 2 and "Did you mean 'shout'" in wrong.stderr
    refused = run(both, tmp_path, "prunehal", "decoder=[shout]", "decoder.shout.token=100000", "task.count=1")
    assert (
        refused.returncode == 2
        and "shout: the model has no token 100000" in refused.stderr
        and "captions" not in refused.stdout + refused.stderr
    )
    refused = run(both, tmp_path, "prunehal", "decoder=[shout]", "decoder.shout.times=many", "task.count=1")
    assert refused.returncode == 2 and "shout: times is an integer >= 1, not 'many'" in refused.stderr


def test_a_broken_entry_point_is_named(site, tmp_path):
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info/entry_points.txt").write_text("[prunehal.conf]\nbroken = no_such_package.conf\n")
    done = run(f"{site}{os.pathsep}{tmp_path}", tmp_path, "prunehal", "decoder=[prunehal]")
    assert (
        done.returncode == 2 and "the entry point 'broken' of prunehal.conf names 'no_such_package.conf'" in done.stderr
    )
