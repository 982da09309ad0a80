"""What runs share beside the store: a server of MLflow, and a study of Optuna that several processes search."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from slurm import free_ports
from sweep_commands import SMALL, kept, run, start, sweep

from experiments.integrations import loggers

pytestmark = pytest.mark.slow


class Server:
    """The REST interface of MLflow at an address."""

    def __init__(self, address: str):
        self.address = address

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=5).read() == b"OK"
        except (urllib.error.URLError, ConnectionError):
            return False

    def ask(self, what: str, **asked) -> dict:
        request = urllib.request.Request(
            f"{self.address}/api/2.0/mlflow/{what}",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request, timeout=60))


@pytest.fixture
def server(tmp_path):
    """A server of MLflow with an SQLite file of its own, by the program of MLFLOW_PROGRAM, else by this Python's.

    MLflow's server needs SQLAlchemy 2 and Hydra's Optuna sweeper 1, so that one environment has not both.
    """
    pytest.importorskip("mlflow", reason="needs mlflow")
    if not (program := os.environ.get("MLFLOW_PROGRAM")):
        pytest.importorskip("sqlalchemy", "2", reason="MLflow's server needs SQLAlchemy 2: MLFLOW_PROGRAM=FILE")
        program = Path(sys.executable).with_name("mlflow")
    [port] = free_ports(1)
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    kept_in = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.sqlite", "--artifacts-destination", "artifacts"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [program, "server", *words, *kept_in],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        found, until = Server(f"http://127.0.0.1:{port}"), time.time() + 180
        while not found.answers():
            assert process.poll() is None and time.time() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def test_an_mlflow_server_is_told_the_metrics_of_jobs_at_once(tmp_path, server):
    words = ["decoder=[],[prunehal]", "hydra/launcher=processes", "logger=[mlflow]", *SMALL]
    code, out, errors = run(*sweep(tmp_path / "sweep", *words), env={"MLFLOW_TRACKING_URI": server.address})
    assert code == 0, out + errors
    [experiment] = server.ask("experiments/search", max_results=10, filter="name = 'prunehal'")["experiments"]
    runs = server.ask("runs/search", experiment_ids=[experiment["experiment_id"]])["runs"]
    assert len(runs) == 2 and {one["info"]["status"] for one in runs} == {"FINISHED"}
    told = {
        frozenset(p["key"] for p in one["data"]["params"] if p["key"].startswith("decoder.")): {
            m["key"]: m["value"] for m in one["data"]["metrics"]
        }
        for one in runs
    }
    for number, metrics in zip("01", (told.pop(key) for key in sorted(told, key=len)), strict=True):
        own = loggers.numbers(json.loads((tmp_path / "sweep" / number / "metrics.json").read_text()))
        assert metrics == pytest.approx({k: v for k, v in own.items() if v == v}) and len(metrics) > 10
    assert {k.partition("/")[0] for k in metrics} == {"prunehal"}


def test_an_mlflow_experiment_that_another_job_has_just_made_is_taken(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker

    PartialState()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.sqlite")
    made, search, looks = mlflow.create_experiment("prunehal"), mlflow.search_experiments, []

    def late(*args, **more):
        looks.append(search(*args, **more))
        return looks[-1] if len(looks) > 1 else []

    monkeypatch.setattr(mlflow, "search_experiments", late)
    tracker = MLflowTracker("prunehal")
    loggers._start("mlflow", tracker)
    tracker.finish()
    assert len(looks) == 2 and tracker.tracker.info.experiment_id == made


def test_an_mlflow_server_that_does_not_answer_is_said_before_anything_is_loaded(tmp_path):
    pytest.importorskip("mlflow", reason="needs mlflow")
    nowhere = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_ports(1)[0]}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    words = ["logger=[mlflow]", *SMALL, f"results={tmp_path}/results.sqlite", f"hydra.run.dir={tmp_path}/run"]
    code, out, errors = run(*words, env=nowhere)
    assert code == 2 and "logger=[mlflow] does not start" in errors and "Traceback" not in errors, out + errors
    assert kept(tmp_path / "results.sqlite") == []


def trials_of(study: Path) -> dict[int, tuple[str, float, dict[str, float]]]:
    """State, value and parameters of each trial of the only study in a file, by number."""
    with closing(sqlite3.connect(study)) as base:
        assert base.execute("SELECT count(*) FROM studies").fetchone() == (1,)
        found = base.execute("SELECT number, state, value FROM trials LEFT JOIN trial_values USING (trial_id)")
        rows = found.fetchall()
        named = base.execute("SELECT number, param_name, param_value FROM trials JOIN trial_params USING (trial_id)")
        parameters: dict[int, dict[str, float]] = {}
        for number, name, value in named:
            parameters.setdefault(number, {})[name.rpartition(".")[2]] = value
    assert len({number for number, *_ in rows}) == len(rows)
    return {number: (state, value, parameters[number]) for number, state, value in rows}


def test_two_processes_search_one_study(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs hydra-optuna-sweeper")
    storage, create = f"sqlite:///{tmp_path}/study.sqlite", ["create-study", "--skip-if-exists", "--study-name", "one"]
    subprocess.run(
        [Path(sys.executable).with_name("optuna"), *create, "--direction", "maximize", "--storage", storage], check=True
    )
    shared = ["hydra/sweeper=search", "objective=recall", "hydra.sweeper.n_trials=4", *SMALL]
    shared += ["hydra.sweeper.study_name=one", f"hydra.sweeper.storage={storage}"]
    searches = [
        start(*sweep(tmp_path / name, *shared, f"hydra.sweeper.sampler.seed={seed}"))
        for seed, name in enumerate(("first", "second"))
    ]
    for process in searches:
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, out + errors
    found = trials_of(tmp_path / "study.sqlite")
    assert sorted(found) == list(range(8)) and {state for state, *_ in found.values()} == {"COMPLETE"}
    tried = {}
    for folder in (tmp_path / name / str(number) for name in ("first", "second") for number in range(4)):
        own = yaml.safe_load((folder / "config.yaml").read_text())["decoder"]["prunehal"]
        recall = json.loads((folder / "metrics.json").read_text())["[prunehal]"]["recall"]["value"]
        tried[own["r"], own["t"]] = pytest.approx(recall)
    assert len(tried) == 8 and {(p["r"], p["t"]): value for _, value, p in found.values()} == tried
    assert len(kept(tmp_path / "results.sqlite")) == 8 * 4
