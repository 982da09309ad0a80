"""`report=FILE.html` and `show=true`: the command writes the page of its run, in this process."""

import json
import re
import sys
import webbrowser

import pytest
from rich.console import Console

from experiments.cli import page
from experiments.report import __main__ as report
from experiments.report import again
from experiments.runner import setup
from experiments.scenes import evaluate, world

SMALL = ["task=absent", "task.count=2", "max_new_tokens=60"]


@pytest.fixture
def command(run_here, monkeypatch, tmp_path):
    """Types words in an empty folder; returns the exit code, the output and the errors, each on one line."""
    monkeypatch.chdir(tmp_path)

    def typed(*words, **more):
        done = run_here(*words, columns=400, **more)
        return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())

    return typed


@pytest.fixture
def screen(monkeypatch):
    """A screen, and the list of what the browser was asked to open."""
    asked: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda place: bool(asked.append(place)) or True)
    return asked


def stacks(file):
    """Labels of the captions on a page, and how many have maps."""
    text = file.read_text()
    return re.findall(r"<h4[^>]*>(?:<[^>]*>)*(\[[^<]*\])", text), text.count('type="text/plain"')


def stopped(*_):
    raise KeyboardInterrupt


def test_a_picture_of_ones_own(command, monkeypatch, tmp_path):
    (scene,) = evaluate.scenes("validation", "typical", 1)
    world.render(scene).save(tmp_path / "photo.png")
    words = ["image=photo.png", "max_new_tokens=24", "report=mine/page.html", "hydra.run.dir=out"]
    code, out, err = command(*words)
    assert code == 0, err
    made = tmp_path / "mine/page.html"
    assert stacks(made) == (["[]", "[prunehal]"], 2) and "page: mine/page.html, 1 picture," in out
    assert "data:image/webp" in made.read_text() and '<mark class="false" title=' not in made.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(again, "_again", stopped)  # Ctrl-C while maps are made
        code, out, _ = command(*words)
    assert code == 130 and out.count("1 of 1 answers are in the store") == 2  # and the page is written all the same
    assert stacks(made) == (["[]", "[prunehal]"], 0) and "was stopped: 0 captions have one" in made.read_text()
    code, out, err = command("out", "--attention", "0", program=report.main)  # the folder names its store
    assert code == 0, err
    assert stacks(tmp_path / "report.html") == (["[]", "[prunehal]"], 0)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert command("moved", "--attention", "0", program=report.main)[0] == 0
    (tmp_path / "outputs/results.sqlite").rename(tmp_path / "elsewhere.sqlite")
    code, _, err = command("moved", program=report.main)
    assert code == 2 and "there is no store" in err and "--results" in err
    assert command("moved", "--attention", "0", "--results", "elsewhere.sqlite", program=report.main)[0] == 0


def test_beside_plain_decoding_stands_prunehal_and_the_browser_opens(command, screen, tmp_path):
    code, out, err = command("decoder=[]", "show=true", "hydra.run.dir=out", "objective=f1", *SMALL)
    assert code == 0, err
    made = tmp_path / "out/report.html"
    assert screen == [made.as_uri()] and stacks(made) == (["[]", "[prunehal]"] * 2, 4)
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert [row["stack"] for row in rows] == ["[]"] * 2 + ["[prunehal]"] * 2 and rows[2]["prunes"]
    wrong = [m for row in rows for m in row["mentions"] if m["object"] in row["hallucinated"]]
    assert made.read_text().count('<mark class="false" title=') == len(wrong) > 0
    assert (
        made.read_text().count('<mark class="true" title=')
        == sum(len(row["mentions"]) for row in rows) - len(wrong)
        > 0
    )


@pytest.mark.parametrize("given", [{}, {"DISPLAY": ":0"}], ids=["no screen", "no browser"])
def test_without_a_browser_it_says_where_the_page_is(monkeypatch, tmp_path, capsys, given):
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    asked = []
    monkeypatch.setattr(webbrowser, "open", lambda place: bool(asked.append(place)))  # False: none was found
    page.open_page(tmp_path / "a page.html", Console())
    place = f"file://{tmp_path}/a%20page.html"
    assert f"there is no browser here; open {place}" in capsys.readouterr().out and asked == [place] * len(given)


def test_each_job_of_a_multirun_has_its_page(command, tmp_path):
    words = ["-m", "decoder=[],[prunehal]", "compare=false", "report=page.html", "hydra.sweep.dir=many"]
    code, _, err = command(*words, "task.count=1", "max_new_tokens=8")
    assert code == 0, err
    assert [stacks(tmp_path / f"many/{job}/page.html")[0] for job in "01"] == [["[]"], ["[prunehal]"]]
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report=page.txt"], "report names the page that is to be written, FILE.html, not 'page.txt'"),
        (["report=true"], "FILE.html, not True"),
        (["report=there.html"], "report=there.html is a folder; name a file in it: report=there.html/report.html"),
        (["report=/dev/null/x/page.html"], "cannot write to the output folder '/dev/null/x' (Not a directory)"),
        (["show=4"], "show is true or false, not 4"),
        (["captions=-1"], "captions is an integer >= 0"),
        (["image=missing", "report=page.html"], "no such image or folder: 'missing'"),
        (["experiment=grid", "show=true"], "python -m experiments.report FOLDER"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_generated(command, tmp_path, words, says):
    (tmp_path / "there.html").mkdir()
    code, out, err = command(*words, "task.count=1")
    assert code == 2 and says in err and not (tmp_path / "outputs/results.sqlite").exists()


def test_runs_are_the_same_with_and_without_a_page(composed):
    plain, paged = composed(), composed("report=page.html", "show=true", "captions=0")
    assert setup.settings(plain) == setup.settings(paged)


def test_several_stores_are_refused(command, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.json").write_text(json.dumps({"results": f"/{name}.sqlite", "runs": {"[]": "1"}}))
    code, _, err = command("a", "b", program=report.main)
    assert code == 2 and "these runs are in 2 stores: /a.sqlite, /b.sqlite" in err
    (tmp_path / "a/runs.json").write_text("{}")
    code, _, err = command("a", program=report.main)
    assert code == 2 and "does not say which runs are the folder's" in err
