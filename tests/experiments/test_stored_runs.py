"""Runs of earlier versions are continued: their ids are digests of settings, class and option names included."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import results
from experiments.results import Results
from experiments.runner import setup

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads(Path(__file__).with_name("stored_runs.json").read_text())  # of the commit `made_by`


@pytest.mark.parametrize("run", STORED["runs"], ids=lambda run: run["id"])
def test_a_run_of_an_earlier_version_has_the_same_id_today(run):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("run", STORED["overrides"])
    today = setup.settings(config) | {"folder": run["config"]["folder"]}
    if not run["config"]["decoder"]:
        today["decoder"] = {}
    assert json.loads(json.dumps(today)) == run["config"]
    assert results.digest(today) == run["id"]


def _older(file, items, code="older"):
    """A store with a run of `experiments.watch.Watch`, as it was when the class stood there."""
    config = {"decoder": {"watch": {"_target_": "experiments.watch.Watch"}}, "seed": 0}
    run, store = results.digest(config), Results(file)
    with closing(sqlite3.connect(file)) as base, base:
        words = (run, "2026-01-01T00:00:00+00:00", "[watch]", json.dumps(config, sort_keys=True), code, "{}")
        base.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", words)
        for item in items:
            row = json.dumps({"image": item, "caption": code})
            base.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (run, item, code, row))
    return store, run


def test_runs_of_a_class_that_has_moved_go_on(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        target = compose("run", ["decoder=[watch]"]).decoder.watch["_target_"]
    today = {"decoder": {"watch": {"_target_": target}}, "seed": 0}
    _, old = _older(tmp_path / "a.sqlite", ["1", "2"])
    for _ in range(2):  # the second finds nothing to rename
        store = Results(tmp_path / "a.sqlite")
        (run,) = store.runs()
        assert run == store.open("[watch]", today) and run.config == today and run.id == results.digest(today) != old
        assert run.count == 2 and run.code == "older" and run.created.startswith("2026-01-01")
        assert [row["caption"] for row in store.rows(run)] == ["older", "older"]
    _older(tmp_path / "b.sqlite", ["2", "3"], "other")
    store.merge(tmp_path / "b.sqlite")
    (run,) = store.runs()
    assert [row["caption"] for row in store.rows(run)] == ["older", "older", "other"]  # what was there stays
