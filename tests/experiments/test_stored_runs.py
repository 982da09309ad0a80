"""Runs of earlier versions are continued: their ids are digests of settings, class and option names included."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import results
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
