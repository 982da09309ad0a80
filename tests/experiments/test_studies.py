"""Studies: their cells, and what they make of answers whose truth is known."""

import json
import math
import os
import re
import signal
import sqlite3
import time
from contextlib import closing
from io import StringIO
from pathlib import Path

import hydra
import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

from experiments import models
from experiments.cli import display
from experiments.inputs import conf_files
from experiments.inputs.errors import InputError
from experiments.metrics import bootstrap, chair
from experiments.results import Estimate, Results, Run, Sheet
from experiments.runner import generate, setup
from experiments.studies import base, causality, cells, failures, frontier, grid, paired, trigger, tuning
from experiments.tasks import Scenes, ScenesPope

ROOT = Path(__file__).resolve().parents[2]


def test_lines_expand_as_a_multirun():
    assert base.expand(["decoder=[a,b],[] search=x,y", "search=x decoder=[]", "decoder=[] search=x"]) == [
        "decoder=[a,b] search=x",
        "decoder=[a,b] search=y",
        "decoder=[] search=x",
        "decoder=[] search=y",
        "search=x decoder=[]",
    ]
    assert base.expand(["model.prompt='What is it?' a=1,2"]) == [
        "'model.prompt=What is it?' a=1",
        "'model.prompt=What is it?' a=2",
    ]


def test_what_is_typed_goes_before_and_is_left_out_where_it_does_not_belong():
    typed = ["task.count=5", "decoder.p.r=0.5", "search=beam"]
    assert base.words(["task.count=500", "task.split=test"], "decoder=[p] search=beam", typed) == [
        "task.count=5",
        "task.split=test",
        "decoder=[p]",
        "search=beam",
        "decoder.p.r=0.5",
    ]
    assert "decoder.p.r=0.5" not in base.words([], "decoder=[]", typed)
    assert "decoder.p.r=0.5" in base.words([], "'decoder=[q, p]'", typed)
    assert base.words(["task=typical", "task.split=test"], "decoder=[]", ["task=pope", "task.count=5"]) == [
        "task=pope",
        "decoder=[]",
        "task.count=5",
    ]
    words = base.words(["task=pope", "task.split=test"], "decoder=[] task.probes=random", ["task=coco_pope"])
    assert sorted(words) == ["decoder=[]", "task.probes=random", "task=coco_pope"]  # what tells cells apart stays


@pytest.mark.parametrize("name", sorted(conf_files.files("experiment")))
def test_every_cell_of_every_study_composes(name):
    study = instantiate(OmegaConf.create(conf_files.read("experiment", name)))
    assert study.name == name
    lines = study.lines()
    assert len(lines) == len(set(lines)) > 1
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for line in lines[:: max(1, len(lines) // 3)]:
            config = hydra.compose("run", base.words(study.settings, line, []))
            assert config.task.count >= 200


def cell(line, captions, objects=("dog",), task=None):
    rows = [
        {"image": str(i), "picture": str(i), "caption": text, "objects": list(objects), "prunes": [], "tokens": 9}
        for i, text in enumerate(captions)
    ]
    return base.Cell(
        line,
        OmegaConf.create({}),
        task or Scenes("validation", "typical"),
        [],
        Run("x", "", line, {}, "", {}),
        rows,
        lambda: None,
    )


def test_a_difference_is_paired_and_corrected():
    rng = np.random.default_rng(0)
    bad = rng.random(200) < 0.5
    better = bad & (rng.random(200) < 0.7)
    text = {True: "A dog and a cat.", False: "A dog."}
    cells = {
        "decoder=[]": cell("decoder=[]", [text[b] for b in bad.tolist()]),
        "decoder=[p]": cell("decoder=[p]", [text[b] for b in better.tolist()]),
        "decoder=[q]": cell("decoder=[q]", [text[b] for b in bad.tolist()]),
    }
    study = paired.Paired("x", "X", [], [["decoder=[]", "decoder=[p]"], ["decoder=[]", "decoder=[q]"]])
    assert study.lines() == list(cells)
    changes, levels, tests, apart = (sheet.records for sheet in study.report(cells, Path()).sheets)
    better_one, same_one = changes
    assert (
        better_one["CHAIR_S %"].value == pytest.approx(100 * (better.mean() - bad.mean()))
        and better_one["CHAIR_S %"].high < 0
    )
    p = {(t["to"], t["metric"]): t for t in tests}
    assert (
        p["[p]", "CHAIR_S %"]["p, Holm"] == pytest.approx(2 * p["[p]", "CHAIR_S %"]["p"])
        and p["[p]", "CHAIR_S %"]["p"] < 0.005
    )
    assert (
        same_one["CHAIR_S %"].value == 0 and p["[q]", "CHAIR_S %"]["p"] == 1 and ("[p]", "words per caption") not in p
    )
    assert (
        str(better_one["CHAIR_S %"]).endswith("]*")
        and str(same_one["CHAIR_S %"]) == "+0.0 [+0.0, +0.0]"
        and not str(better_one["words per caption"]).endswith("*")
    )
    assert [r["cell"] for r in levels] == ["[]", "[p]", "[q]"]
    # by another rule than the published: shown, not tested
    assert {t["metric"] for t in tests} == {Scenes.metrics[m] for m in Scenes.tested}
    assert [(r["metric"], r["to"]) for r in apart] == [
        (Scenes.metrics[m], to) for m in Scenes.beside for to in ("[p]", "[q]")
    ]
    assert not set(Scenes.beside) & set(Scenes.tested) and not any("context" in k for r in changes + levels for k in r)
    assert str(apart[0]["difference"]) == str(better_one["CHAIR_S %"]).rstrip("*")  # nothing to tell the rules apart


def test_matched_lengths_leave_no_difference_that_is_only_length():
    long, short = ["A dog is here. A cat is there."] * 30, ["A dog is here."] * 30
    plain, matched = (
        paired.compare(cell("a", long), cell("b", short), m)["difference"]["chair_s"]["value"] for m in (False, True)
    )
    assert plain == -100 and matched == 0


def test_questions_of_one_picture_are_drawn_together():
    rng = np.random.default_rng(0)
    rows = [
        {"image": f"{i} {k}", "picture": str(i), "caption": "Yes." if right else "No.", "objects": [], "label": "yes"}
        for i, right in enumerate((rng.random(50) < 0.5).tolist())
        for k in range(10)
    ]
    task = ScenesPope("validation", "typical")
    table = task.counts(rows)
    wide, narrow = (
        bootstrap.summary(table, task.rates, groups)["accuracy"] for groups in ([r["picture"] for r in rows], None)
    )
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"]) and wide["value"] == narrow["value"]


def test_holm():
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bootstrap.holm([0.6, 0.9]) == pytest.approx([1, 1])


def test_p_values_are_those_of_a_z_test_on_normal_means():
    rng = np.random.default_rng(0)
    x = rng.normal(0.15, 1, 400)
    draws = bootstrap.weights(400, 10000) @ x / 400
    z = x.mean() / (x.std() / 20)
    assert bootstrap.p_value(draws) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
    assert bootstrap.p_value(np.full(99, 1.0)) == pytest.approx(0.02)


def test_the_lower_frontier():
    """Mixtures of captions: their true and false objects are mixtures, their CHAIR_I is not."""
    points = np.array([[40, 5], [80, 15], [60, 14], [50, 30.0]])
    false = 0.5 * (40 * 5 / 95 + 80 * 15 / 85)
    assert frontier.lower(points, 60) == pytest.approx(100 * false / (false + 60)) == pytest.approx(11.9, abs=0.05)
    assert frontier.lower(points, 40) == pytest.approx(5) and frontier.lower(points, 80) == pytest.approx(15)
    assert frontier.lower(points, 10) == pytest.approx(5)  # to say nothing of some pictures costs no more
    assert frontier.lower(points, 95) == pytest.approx(15)  # beyond all points, that of the last


def test_a_setting_off_the_frontier_is_told_from_one_on_it():
    there = ("dog", "bed", "cup", "car")
    rng = np.random.default_rng(0)

    def captions(recall, false):
        return [
            " ".join(f"A {n}." for n in there if rng.random() < recall) + " A cat." * bool(rng.random() < false)
            for _ in range(300)
        ]

    cells = {}
    for line, values in {
        "decoder=[]": (0.8, 0.5),
        "x.a=1": (0.4, 0.25),
        "x.a=2": (0.6, 0.38),
        "x.b=1": (0.6, 0.05),
        "x.c=1": (0.6, 0.38),
    }.items():
        cells[line] = cell(line, captions(*values), there)
    study = frontier.Frontier(
        "x",
        "X",
        [],
        {"plain": ["decoder=[]"], "trivial": ["x.a=1,2"], "good": ["x.b=1"], "not": ["x.c=1"]},
        ["plain", "trivial"],
    )
    records = {r["cell"]: r for r in study.report(cells, Path()).sheets[0].records}
    assert (
        records["b=1"]["over the frontier"].high < 0
        and records["c=1"]["over the frontier"].low < 0 < records["c=1"]["over the frontier"].high
    )
    assert "over the frontier" not in records["a=1"]


def test_a_confounded_attention_has_no_odds_once_the_step_is_held():
    """Attention falls with the step along a curve, what is false comes along another, and the one has nothing to do
    with the other.
    """
    rng = np.random.default_rng(0)
    hits, n = 0, 10
    for _ in range(n):
        step = rng.uniform(1, 60, 3000)
        said = {
            "caption": np.arange(3000) // 5,
            "step": step,
            "attention": 20 + 60 * np.exp(-step / 8) + rng.normal(0, 3, 3000),
            "frequency": rng.normal(size=3000),
        }
        said["false"] = (rng.random(3000) < 0.05 + 0.3 * (step > 12) + 0.2 * (step > 45)).astype(float)
        found = {(r["model"], r["term"]): r["odds ratio"] for r in causality.regressions(said)}
        assert found["attention", "attention"].high < 0.8
        held = found["attention + frequency + step (spline)", "attention"]
        hits += held.low < 1 < held.high
    assert hits >= n - 2


def test_an_effect_of_attention_is_found_beside_the_step():
    rng = np.random.default_rng(0)
    step = rng.integers(1, 60, 4000).astype(float)
    said = {
        "caption": np.arange(4000) // 5,
        "step": step,
        "attention": 20 + 60 * np.exp(-step / 8) + rng.normal(0, 5, 4000),
        "frequency": rng.normal(size=4000),
    }
    said["false"] = (rng.random(4000) < 1 / (1 + np.exp(0.08 * (said["attention"] - 25)))).astype(float)
    found = {(r["model"], r["term"]): r["odds ratio"] for r in causality.regressions(said)}
    odds = np.exp(-0.08 * said["attention"].std())
    held = found["attention + step (spline)", "attention"]
    assert held.high < 1 and held.low < odds < held.high


def test_labels_tell_cells_apart():
    assert base.short("decoder=[a] search=beam decoder.a.r=0.4 task.split=test") == "[a] beam r=0.4 split=test"
    assert base.short("decoder=[a,b] decoder.a.r=0.4") == "[a,b] a.r=0.4" != base.short("decoder=[a,b] decoder.b.r=0.4")


def test_without_hallucinations_there_are_no_odds():
    (told,) = causality.regressions(
        {k: np.arange(4.0) for k in ("caption", "step", "attention", "frequency")} | {"false": np.zeros(4)}
    )
    assert told["objects"] == 4 and told["hallucinated"] == 0 and "odds ratio" not in told


def test_splines_add_up_to_one():
    x = np.random.default_rng(0).integers(1, 50, 300).astype(float)
    for values in (x, np.ones(5), x[:3]):
        basis = causality.spline(values)
        assert np.isfinite(basis).all() and basis.sum(1) == pytest.approx(1)


def test_attention_by_step_is_compared_within_a_step():
    """Captions with a hallucination are longer here, and look at the picture as the others do at every step."""
    rows = []
    for i in range(60):
        bad = i % 2 == 0
        length = 12 if bad else 6
        rows.append(
            {
                "tokens": length,
                "attention_by_layer": [[0.5 - 0.03 * m, 0.3 - 0.01 * m] for m in range(length)],
                "hallucinated": ["cat"] * bad,
            }
        )
    steps, records = causality.by_step(rows)
    assert [r["step"] for r in records] == list(range(1, 7)) and records[0]["captions with"] == 30
    assert all(r["with minus without"].value == pytest.approx(0) for r in records)
    assert steps["with"][1].value == pytest.approx(40) and steps["without"][6].value == pytest.approx(40 - 5 * 2)


def test_first_mentions_only():
    row = {
        "objects": ["dog"],
        "attention_by_layer": [[0.1 * k] for k in range(6)],
        "hallucinated": ["cat"],
        "tokens": 6,
    }
    row["mentions"] = [
        {"object": "dog", "token": 1},
        {"object": "cat", "token": 3},
        {"object": "dog", "token": 4},
        {"object": "bed", "token": 9},
    ]
    said = causality.objects([row])
    assert (
        said["false"].tolist() == [0, 1]
        and said["attention"] == pytest.approx([10, 30])
        and said["step"].tolist() == [2, 4]
    )
    assert said["frequency"].tolist() == [0, 0]  # in other pictures


def test_the_grid_finds_where_it_is_better():
    lines = {"decoder=[] task.split=test": 0.5} | {
        f"decoder=[p] p.r={r} p.t={t} task.split=test": 0.5 - 0.4 * (r == 0.4) * (t == 2)
        for r in (0.1, 0.4)
        for t in (1, 2)
    }
    cells = {
        line: cell(line, ["A dog and a cat." if k < 60 * share else "A dog." for k in range(60)])
        for line, share in lines.items()
    }
    study = grid.Grid(
        "x", "X", [], ["task.split=test"], "decoder=[]", "decoder=[p]", "p.r", "p.t", [[0.1, 0.4], [1, 2]]
    )
    assert study.lines() == list(cells)
    report = study.report(cells, Path())
    found = {(r["r"], r["t"]): r["CHAIR_S %, minus decoder=[]"].value for r in report.sheets[0].records}
    assert found == pytest.approx({(0.1, 1): 0, (0.1, 2): 0, (0.4, 1): 0, (0.4, 2): -40})


def test_tuning_takes_the_least_hallucination_that_keeps_recall():
    """Of 100 captions: how many name the dog, how many a cat that is not there."""
    said = {
        "decoder=[]": (90, 50),
        "decoder=[p] p.r=1": (60, 0),
        "decoder=[p] p.r=2": (89, 30),
        "decoder=[p] p.r=3": (88, 20),
        "search=beam decoder=[]": (90, 40),
        "search=beam decoder=[q]": (50, 9),
        "search=beam decoder=[q] q.a=1": (70, 9),
    }
    cells = {
        line: cell(line, ["A dog. " * (k < dogs) + "A cat." * (k < cats) for k in range(100)])
        for line, (dogs, cats) in said.items()
    }
    study = tuning.Tuning(
        "x",
        "X",
        [],
        {
            "p": {"base": "decoder=[]", "lines": ["decoder=[p] p.r=1,2,3"]},
            "q": {
                "base": "search=beam decoder=[]",
                "lines": ["search=beam decoder=[q]", "search=beam decoder=[q] q.a=1"],
            },
        },
    )
    assert study.lines() == list(cells)
    report = study.report(cells, Path())
    p, q = report.sheets[0].records
    assert (
        p["chosen"] == "[p] r=3" and p["published"] == "[p] r=1" and p["runs"] == 3 and q["chosen"] == "beam [q] a=1"
    )  # nothing of q keeps recall
    assert (
        p["recall %, chosen minus base (on the pictures that chose it)"].value == pytest.approx(-2)
        and p["CHAIR_I %, per unique object, published"].value == 0
    )
    assert "7 runs, 700 captions, 6300 tokens" in report.sheets[0].title
    assert [r["chosen"] for r in report.sheets[1].records] == ["", "", "yes", "", "yes"]


def test_prunes_are_counted_by_length():
    one = cell("a", ["x"] * 40)
    for k, row in enumerate(one.rows):
        row["tokens"] = 20 if k < 30 else 60
        row["prunes"] = [{"step": 2}] + [{"step": 30}] * (k >= 30)
    counts, classes = (
        sheet.records for sheet in trigger.Trigger("x", "X", [], ["a"]).report({"a": one}, Path()).sheets
    )
    assert (
        counts[0]["prunes"].value == pytest.approx(1.25)
        and counts[0]["2 prunes, %"].value == pytest.approx(25)
        and counts[0]["0 prunes, %"].value == 0
    )
    assert counts[0]["step of prune 2: 10th / 50th / 90th percentile"] == "30 / 30 / 30"
    assert [(r["tokens"], r["n"], r["prunes"].value) for r in classes] == [("0 to 24", 30, 1), ("50 to 74", 10, 2)]
    assert classes[0]["last prune, as a share of the answer"].value == pytest.approx(0.1)
    for row in one.rows:
        row |= {"tokens": 2000, "prunes": []}
    none = trigger.Trigger("x", "X", [], ["a"]).report({"a": one}, Path()).sheets[1].records
    assert [(r["tokens"], r["n"], r["with a prune"], r["last prune, as a share of the answer"]) for r in none] == [
        ("100 or more", 40, 0, "")
    ]


def test_failures_are_counted_and_shown_escaped(tmp_path):
    def side(line, captions):
        one = cell(line, captions, ("dog", "bed"))
        for row in one.rows:
            found = chair.score(row["caption"], row["objects"])
            row |= {
                "stack": line,
                "hallucinated": sorted(found.hallucinated),
                "mentions": [{"object": m.category, "start": m.start, "end": m.end} for m in found.mentions],
            }
        return one

    a, b = (
        side("decoder=[]", ["A dog <b>and</b> a bed."] * 4),
        side("decoder=[p]", ["A cat <script>."] * 3 + ["A dog and a bed."]),
    )
    study = failures.Failures("x", "X", [], "decoder=[]", "decoder=[p]", 2)
    study._drawn = lambda *args: None
    report = study.report({"decoder=[]": a, "decoder=[p]": b}, tmp_path)
    counts = {r["captions with"]: r["%"].value for r in report.sheets[0].records}
    assert (
        counts["more hallucinated objects"] == 75
        and counts["worse in both"] == 75
        and counts["as many hallucinated objects"] == 25
    )
    assert {
        r["object"]: (r["made up only with the cell"], r["named only by the base"]) for r in report.sheets[1].records
    } == {"cat": (3, 0), "dog": (0, 3), "bed": (0, 3)}
    page = (tmp_path / "x.html").read_text()
    assert "<script>" not in page and "A <b>cat</b> &lt;script&gt;." in page


def test_what_was_dropped_lies_where_it_was(monkeypatch, composed):
    """The patches that a layer kept are laid over the picture at their own places."""
    conf = composed("decoder=[prunehal]", "task.count=1")
    item = Scenes("validation", "typical", 0, 1).items()[0]
    loaded = models.load(conf.model)
    one = base.Cell(
        "x",
        conf,
        Scenes("validation", "typical"),
        [item],
        Run("x", "", "x", {}, "", {}),
        [],
        lambda: setup.speaker(conf, loaded, Console(quiet=True)),
    )
    row = {"image": item.id, "caption": "other", "objects": item.objects, "mentions": [], "hallucinated": []}
    drawn = {}
    monkeypatch.setattr(
        failures.plt.Axes, "imshow", lambda self, picture: drawn.setdefault(len(drawn), np.asarray(picture))
    )
    figure = failures.Failures("x", "X", [], "a", "b")._drawn(one, [(row, row)])
    whole, dimmed = (drawn[k].astype(float) for k in (0, 1))
    side = round(
        len(
            [
                t
                for t in generate.batch(one.speaker(), [(item, item.open())])["input_ids"][0].tolist()
                if t == loaded[0].config.image_token_id
            ]
        )
        ** 0.5
    )
    patch = whole.shape[0] // side
    assert whole.shape == dimmed.shape and patch * side == whole.shape[0]
    shares = (dimmed.sum(-1) / whole.sum(-1)).reshape(side, patch, side, patch)
    assert shares.max() > shares.min() + 0.2
    assert (shares.max((1, 3)) - shares.min((1, 3))).max() < 0.1  # one share a patch
    assert "another caption this time" in figure.axes[1].get_title()


@pytest.mark.parametrize(
    "study, typed, words",
    [
        (
            "compatibility",
            ["search=beam"],
            "'search=beam' does not go with this study, whose cell 'search=greedy decoder=\\[\\]' sets search itself",
        ),
        ("ranking", ["decoder.prunehal.keep=random"], "sets decoder.prunehal.keep itself"),
        ("frontier", ["task=pope"], "needs what 'POPE.*does not measure: Unknown metric '"),
        ("failures", ["task=pope"], "does not measure"),
        ("grid", ["task=pope"], "does not measure"),
        ("ranking", ["image=tests"], "nobody can score"),
        ("grid", ["task=mmhal"], "does not go with what was typed: Key 'split' is not in struct"),
        ("grid", ["task.split=validation"], "sets task.split itself"),
    ],
)
def test_what_does_not_fit_a_study_is_said_before_anything_is_generated(study, typed, words, tmp_path):
    asked = instantiate(OmegaConf.create(conf_files.read("experiment", study)))
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(InputError, match=words):
        cells.study_cells(asked, typed, Results(tmp_path / "results.sqlite"), Console(quiet=True))


def test_a_killed_study_goes_on_without_repeating_or_losing_an_answer(tmp_path, run_here):
    words = [
        "task.count=6",
        "batch_size=2",
        "max_new_tokens=8",
        f"hydra.run.dir={tmp_path}",
        f"results={tmp_path}/results.sqlite",
    ]
    if not (process := os.fork()):  # a process of its own, which has imported everything
        try:
            run_here("experiment=ranking", *words)
        finally:
            os._exit(1)
    until = time.time() + 200
    store = tmp_path / "results.sqlite"

    def answers():
        if not store.exists():
            return []
        with closing(sqlite3.connect(store, timeout=60)) as base:
            known = base.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone()
            return base.execute("SELECT rowid, run, item, row FROM answers ORDER BY rowid").fetchall() if known else []

    while time.time() < until and len(answers()) < 8 and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    before = answers()
    assert 8 <= len(before) < 78 and len(before) % 2 == 0
    again = run_here("experiment=ranking", *words)
    assert again.returncode == 0, again.stderr
    after = answers()
    assert after[: len(before)] == before and len(after) == 78 == len({(r, i) for _, r, i, _ in after})
    assert "answers are in the store" in again.stdout
    table = (tmp_path / "ranking-1.csv").read_text()
    assert table.count("\n") == 13 and (tmp_path / "ranking.png").stat().st_size > 5000
    # everything is there: a third time nothing is generated
    third = run_here("experiment=ranking", *words)
    assert third.returncode == 0 and "tokens/s" not in third.stdout and answers() == after, third.stderr
    assert (tmp_path / "ranking-1.csv").read_text() == table
    assert json.loads(after[0][3])["image"].startswith("test-typical")


@pytest.mark.parametrize("width, kind", [(60, "cut"), (80, "turned"), (80, "cut"), (500, "whole")])
def test_no_number_breaks_on_a_narrow_screen(width, kind):
    many = kind != "turned"
    records = [
        {"cell": f"beam [opera,prunehal] {i}"}
        | {f"the metric {k}": Estimate(-1234.5, -2000.25, 1.5) for k in range(12)}
        for i in range(8 if many else 2)
    ]
    console = Console(width=width, file=StringIO())
    display.sheet(console, Sheet("A table", records))
    told = console.file.getvalue()
    assert max(map(len, told.splitlines())) <= width
    numbers = re.findall(r"-1234\.5(?!\d)", told)
    assert len(numbers) == 12 * len(records) if kind != "cut" else len(records) <= len(numbers) < 12 * len(records)
    assert (
        ("more columns" in told) == (kind == "cut")
        and ("intervals" in told) == (width < 500)
        and ("[-2000.2" in told) == (width == 500)
    )
