"""Sweeps and many workers: the same answers as one by one, nothing twice, nothing lost, whatever dies."""

import importlib.util
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray_here
import yaml
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from sweep_commands import SMALL, kept, plain, run, said, start, sweep

from experiments import models
from experiments.cli import arguments, job
from experiments.cli import sweep as sweep_table
from experiments.inputs.errors import InputError
from experiments.integrations import loggers
from experiments.results import Estimate, Results, Sheet
from experiments.results.__main__ import main as store_command
from experiments.runner import generate, setup, workers
from experiments.tasks import Item

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
OPTUNA = pytest.mark.skipif(
    not (importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper")),
    reason="needs hydra-optuna-sweeper",
)
RAY = ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]


@pytest.fixture(scope="module")
def one_by_one(composed):
    """The rows of each stack, answered in this process."""
    model, processor = models.load(models.entry("scenes"))
    out = {}
    for stack in ("", "prunehal", "deco"):
        cfg = composed(f"decoder=[{stack}]", *SMALL)
        speaker = setup.speaker(cfg, (model, processor), Console(quiet=True))
        found = list(speaker.each(generate.plan(cfg.decoder), [setup.task(cfg).items()[at : at + 2] for at in (0, 2)]))
        out[f"[{stack}]"] = [json.loads(json.dumps(plain(row))) for _, answered in found for row in answered.rows]
    return out


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        pytest.param(["hydra/launcher=processes"], marks=pytest.mark.slow),
        pytest.param(["hydra/launcher=submitit_local"], marks=pytest.mark.slow),
        pytest.param(["hydra/launcher=ray", *RAY], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0].partition("=")[2] if words else "in this process",
)
def test_a_sweep_says_what_its_jobs_say_alone_and_one_that_fails_stops_no_other(
    tmp_path, launcher, one_by_one, run_here
):
    if launcher:
        pytest.importorskip(
            {
                "processes": "hydra_plugins.hydra_joblib_launcher",
                "submitit_local": "hydra_plugins.hydra_submitit_launcher",
                "ray": "hydra_plugins.hydra_ray_launcher",
            }[launcher[0].partition("=")[2]]
        )
    (tmp_path / "conf/decoder").mkdir(parents=True)
    (tmp_path / "conf/decoder/broken.yaml").write_text("broken:\n  _target_: prunehal.PruneHal\n  r: 1.5\n")
    words = sweep(tmp_path / "sweep", "decoder=[broken],[],[prunehal],[deco]", *SMALL, *launcher)
    if launcher:
        code, out, errors = run(f"--config-dir={tmp_path}/conf", *words)
    else:
        done = run_here(f"--config-dir={tmp_path}/conf", *words)
        code, out, errors = done.returncode, done.stdout, done.stderr
    assert code == 2 and "1 of 4 jobs failed: #0" in errors, out + errors
    assert [said(tmp_path / "sweep" / job) for job in "123"] == list(one_by_one.values())
    assert not (tmp_path / "sweep/0/captions.jsonl").exists()
    found = kept(tmp_path / "results.sqlite")
    assert len(found) == 12 == len({row[1:3] for row in found}) and len({row[1] for row in found}) == 3


def test_a_search_that_cannot_run_ends_in_its_error(tmp_path, run_here):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs hydra-optuna-sweeper")
    done = run_here(*sweep(tmp_path / "sweep", "hydra/sweeper=search", "objective=f2"))
    assert done.returncode == 2 and "Did you mean 'f1'" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_a_search_takes_the_best_of_its_trials_and_logs_each(tmp_path, run_here):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs hydra-optuna-sweeper")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    words = [
        "hydra/sweeper=search",
        "hydra.sweeper.n_trials=4",
        "objective=recall",
        "logger=[tensorboard]",
        f"hydra.sweeper.storage=sqlite:///{tmp_path}/optuna.sqlite",
    ]
    done = run_here(*sweep(tmp_path / "sweep", *words, *SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = [json.loads((tmp_path / "sweep" / trial / "metrics.json").read_text())["[prunehal]"] for trial in "0123"]
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == max(m["recall"]["value"] for m in metrics) and best["best_params"].keys() == {
        "decoder.prunehal.r",
        "decoder.prunehal.t",
    }
    tried = [
        yaml.safe_load((tmp_path / "sweep" / trial / "config.yaml").read_text())["decoder"]["prunehal"]
        for trial in "0123"
    ]
    assert len({t["r"] for t in tried}) == 4 and all(0.3 <= t["r"] <= 0.95 for t in tried)
    for trial, told in zip("0123", metrics, strict=False):
        read = events.EventAccumulator(str(tmp_path / "sweep" / trial / "tensorboard")).Reload()
        for name in ("recall", "f1"):
            for tag, end in (
                (f"prunehal/{name}", "value"),
                (f"prunehal/{name}/low", "low"),
                (f"prunehal/{name}/high", "high"),
            ):
                assert read.Scalars(tag)[0].value == pytest.approx(told[name][end])
        [settings] = (tmp_path / "sweep" / trial / "tensorboard").rglob("hparams.yml")
        assert yaml.safe_load(settings.read_text())["decoder.prunehal.r"] == tried[int(trial)]["r"]


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two processors in this process."""
    ray = pytest.importorskip("ray", reason="needs ray")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, logging_level="error"
    )
    yield ray
    ray.shutdown()


class Deadly(Results):
    """A store at whose first answers a worker is killed."""

    victim = None

    def add(self, run, rows):
        super().add(run, rows)
        if self.victim:
            os.kill(self.victim, signal.SIGKILL)
            self.victim = None


@pytest.fixture
def asked(tmp_path, composed):
    """What the tests of workers ask: scenes, two images and two that cannot be read; config, items, store and plan."""
    (tmp_path / "pictures").mkdir()
    for k in range(2):
        Image.new("RGB", (60, 40), (90 * k, 40, 200)).save(tmp_path / f"pictures/{k}.png")
    (tmp_path / "pictures/broken.png").write_text("no picture")
    cfg = composed(*SMALL, "task.count=7", "workers=2")
    own = [Item(p.name, None, p) for p in sorted((tmp_path / "pictures").iterdir())] + [
        Item("none", None, tmp_path / "none.png")
    ]
    return cfg, setup.task(cfg).items() + own, Deadly(tmp_path / "results.sqlite"), generate.plan(cfg.decoder)


def with_model_of(cfg, **changed):
    """The config's entry of the model, changed."""
    entry = cfg.model.copy()
    entry.update(changed)
    return entry


def same_answers(store, items, one, two) -> None:
    ids = [item.id for item in items]
    one, two = store.rows(one, ids), store.rows(two, ids)
    assert len(two) == 9 and [plain(row) for row in one] == [plain(row) for row in two]
    assert all(row["seconds"] > 0 for row in two) and any(row["prunes"] for row in two)


def test_workers_say_what_one_says_also_when_one_dies_for_good(asked, monkeypatch):
    """In this process, which stands in for Ray's; the next test is of real ones."""
    monkeypatch.setitem(sys.modules, "ray", ray := ray_here.Ray(cpus=2))
    cfg, items, store, plan = asked
    out = Console(file=io.StringIO(), width=200)
    here, there = store.open("[prunehal]", {"workers": 1}), store.open("[prunehal]", {"workers": 2})
    alone = setup.speaker(cfg, models.load(cfg.model), out)
    assert generate.describe(alone, plan, items, store, here) == ["broken.png", "none"]
    with workers.started(cfg) as actors:
        assert ray.running and len(ray.alive) == 2
        crew = workers.Crew.of(setup.speaker(cfg, (None, None), out), cfg.model, list(actors))
        crew.refuse([plan])
        actors[0].answers_left = 1
        assert generate.describe(crew, plan, items, store, there) == ["broken.png", "none"]
        assert crew.actors == actors[1:] and "a worker has died for good; 1 go on" in out.file.getvalue()
        with pytest.raises(InputError, match="there is no folder './nowhere'"):
            workers.Crew.of(alone, with_model_of(cfg, path="./nowhere"), actors[1:]).refuse([plan])
        actors[1].answers_left = 1
        last = store.open("[prunehal]", {"workers": 3})
        with pytest.raises(InputError, match="every worker has died, the last with: the actor died"):
            generate.describe(crew, plan, items, store, last)
    assert not ray.running and not ray.alive
    same_answers(store, items, here, there)
    assert sum(row[1] in (here.id, there.id) for row in kept(store.file)) == 18
    cfg.workers = 3
    with pytest.raises(InputError, match="3 workers with 1 CPU each do not fit: Ray has 2"), workers.started(cfg):
        pass


@pytest.mark.slow
def test_workers_say_what_one_says_also_when_one_is_killed(asked, cluster):
    cfg, items, store, plan = asked
    out = Console(file=io.StringIO(), width=200)
    here, there = store.open("[prunehal]", {"workers": 1}), store.open("[prunehal]", {"workers": 2})
    alone = setup.speaker(cfg, models.load(cfg.model), out)
    assert generate.describe(alone, plan, items, store, here) == ["broken.png", "none"]
    with workers.started(cfg) as actors:
        crew = workers.Crew.of(setup.speaker(cfg, (None, None), out), cfg.model, actors)
        crew.refuse([plan])
        pids = cluster.get([actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in actors])
        store.victim = pids[1]
        assert generate.describe(crew, plan, items, store, there) == ["broken.png", "none"]
        assert store.victim is None and not psutil.pid_exists(pids[1])
        again = cluster.get([actor.__ray_call__.remote(lambda worker: os.getpid()) for actor in actors])
        assert again[0] == pids[0] and again[1] != pids[1]  # started again, not left out
        with pytest.raises(InputError, match="there is no folder './nowhere'"):
            workers.Crew.of(alone, with_model_of(cfg, path="./nowhere"), actors).refuse([plan])
    same_answers(store, items, here, there)
    assert len(kept(store.file)) == 18
    cfg.workers = 3
    with pytest.raises(InputError, match="3 workers with 1 CPU each do not fit: Ray has 2"), workers.started(cfg):
        pass
    assert out.file.getvalue().count("skipped broken.png") == 2


@pytest.mark.slow
def test_ray_in_a_run_and_a_study_of_their_own(tmp_path):
    pytest.importorskip("ray")
    more = [
        "task.count=3",
        "batch_size=1",
        "max_new_tokens=12",
        "workers=2",
        "+ray.init.num_cpus=2",
        f"results={tmp_path}/results.sqlite",
    ]
    code, out, errors = run("experiment=ranking", *more, f"hydra.run.dir={tmp_path}/study")
    assert code == 0, out + errors
    assert (
        len(kept(tmp_path / "results.sqlite")) == 39
        and (tmp_path / "study/ranking-1.csv").read_text().count("\n") == 13
    )
    process = start(
        "task.count=200",
        *more[1:],
        f"hydra.run.dir={tmp_path}/run",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.time() + 300
    while time.time() < until and len(kept(tmp_path / "results.sqlite")) < 43:
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    names = [child.name() for child in children]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "are kept" in out, errors
    assert len(said(tmp_path / "run")) == len(kept(tmp_path / "results.sqlite")) - 39 >= 4
    assert any(name.startswith("ray::Worker") for name in names) and not psutil.wait_procs(children, timeout=60)[1]


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    words = [
        *sweep(
            tmp_path / "sweep",
            "decoder=[],[prunehal]",
            "compare=false",
            "task.count=30",
            "batch_size=1",
            "max_new_tokens=20",
        )
    ]
    process, until = start(*words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)), time.time() + 300
    while time.time() < until and len(kept(tmp_path / "results.sqlite")) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "are kept" in out, errors
    told = out.strip().splitlines()[-1].strip()
    assert told == f"hydra.sweep.dir='{tmp_path}/sweep'"
    assert 2 <= len(before := kept(tmp_path / "results.sqlite")) < 60
    code, out, errors = run(*words[:-2], told.replace("'", ""), words[-1])
    assert code == 0 and "of 30 answers are in the store" in out, out + errors
    assert len(after := kept(tmp_path / "results.sqlite")) == 60 and after[: len(before)] == before


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_repeating_or_losing_an_answer(tmp_path):
    words = sweep(
        tmp_path / "sweep",
        "hydra/launcher=processes",
        "decoder=[],[prunehal],[deco]",
        "compare=false",
        "task.count=6",
        "batch_size=1",
        "max_new_tokens=20",
    )
    process, until = start(*words, start_new_session=True), time.time() + 300
    while time.time() < until and len(kept(tmp_path / "results.sqlite")) < 5:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = kept(tmp_path / "results.sqlite")
    assert 5 <= len(before) < 18
    code, out, errors = run(*words)
    assert code == 0, out + errors
    after = kept(tmp_path / "results.sqlite")
    assert after[: len(before)] == before and len(after) == 18 == len({row[1:3] for row in after})
    assert "of 6 answers are in the store" in out + errors
    assert [len(said(tmp_path / "sweep" / job)) for job in "012"] == [6, 6, 6]


@pytest.mark.parametrize(
    "line, words",
    [
        (["-m", "hydra/launcher=jobib"], "Did you mean 'joblib'? Valid: basic, cluster, joblib, processes"),
        (["-m", "hydra/sweeper=optna"], "Did you mean 'optuna'"),
        pytest.param(["-m", "hydra/sweeper=search"], "name it: objective=f1", marks=OPTUNA),
        (["-m", "hydra.sweep.dir=/dev/null/x"], "choose another: hydra.sweep.dir=FOLDER"),
        (["logger=[tensorbord]"], "Did you mean 'tensorboard'"),
        (["worker=2"], "Did you mean 'workers'"),
    ],
)
def test_bad_words_of_sweeps_name_the_nearest(line, words):
    with pytest.raises(InputError) as error:
        arguments.check(line)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name, package",
    [("joblib", "hydra-joblib-launcher"), ("slurm", "hydra-submitit-launcher"), ("cluster", "hydra-ray-launcher")],
)
def test_a_launcher_that_is_not_installed_names_its_package(name, package, monkeypatch):
    monkeypatch.setattr(arguments.ConfigStore.instance(), "list", lambda group: ["basic.yaml"])
    with pytest.raises(InputError, match=f"pip install {package}"):
        arguments.check(["-m", f"hydra/launcher={name}"])


def test_a_machine_without_slurm_is_named(monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    monkeypatch.setattr(arguments.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs Slurm, and there is no sbatch here"):
        arguments.check(["-m", "hydra/launcher=slurm"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["objective=f2"], "Did you mean 'f1'"),
        (["workers=0"], "integer >= 1, or auto"),
        (["logger=[mlflow]"], "pip install mlflow accelerate"),
    ],
)
def test_bad_values_are_said_before_anything_is_loaded(tmp_path, words, said, monkeypatch, composed):
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError) as error:
        job.job(composed(f"results={tmp_path}/results.sqlite", *SMALL, *words), tmp_path)
    assert said in str(error.value) and kept(tmp_path / "results.sqlite") == []


def numbers_of(cfg) -> dict[str, float]:
    """What the logger of a config is told of a run."""
    told = loggers.numbers(
        {
            "[]": {"n": 4, "f1": {"value": 50.0, "low": 40.0, "high": float("nan")}},
            "[opera,prunehal]": {"tokens_per_second": 7.5, "difference": {"f1": {"value": -1.5, "p": 0.5}}},
        }
    )
    with loggers.started(cfg) as log:
        log(told)
    return told


def test_numbers_have_names_that_every_logger_takes():
    told = loggers.numbers(
        {"[]": {"n": 4}, "[opera,prunehal]": {"f1": {"value": 1.0, "low": 0.5}, "difference": {"f1": {"p": 0.1}}}}
    )
    assert told == {
        "none/n": 4.0,
        "opera-prunehal/f1": 1.0,
        "opera-prunehal/f1/low": 0.5,
        "opera-prunehal/difference/f1/p": 0.1,
    }


@pytest.mark.slow
def test_wandb_offline(tmp_path, composed):
    pytest.importorskip("wandb", reason="needs wandb")
    own = ["logger=[wandb]", f"logger.wandb.dir={tmp_path}", "+logger.wandb.mode=offline"]
    told = numbers_of(composed(f"results={tmp_path}/results.sqlite", *SMALL, *own))
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    names = {name.encode() for name, value in told.items() if value == value} | {
        b"decoder.prunehal.r",
        b"decoder.prunehal.t",
    }
    until = time.time() + 60  # wandb's own process writes, and goes on after the end
    while time.time() < until and any(name not in file.read_bytes() for name in names):
        time.sleep(0.2)
    assert {name for name in names if name not in file.read_bytes()} == set()


@pytest.mark.slow
def test_mlflow_in_a_folder(tmp_path, composed):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.sqlite")
    told = numbers_of(composed(f"results={tmp_path}/results.sqlite", *SMALL, "logger=[mlflow]"))
    [found] = mlflow.search_runs(experiment_names=["prunehal"], output_format="list")
    assert (
        found.data.metrics == {k: v for k, v in told.items() if v == v}
        and found.data.params["decoder.prunehal.t"] == "4"
    )


def test_a_table_is_logged_whole():
    """Rows that differ in numbers alone have names of their own."""
    rows = [{"place": "p", "r": r, "f1": Estimate(r, 0, 1)} for r in (0.4, 0.8)]
    assert loggers.table(Sheet("grid", rows)) == {
        f"p r={r}/{k}": v for r in (0.4, 0.8) for k, v in (("r", r), ("f1", r), ("f1/low", 0), ("f1/high", 1))
    }
    assert loggers.table(Sheet("pairs", [{"to": "b", "n": 5}])) == {"b/n": 5.0}


def store_of(file: Path, **runs) -> Results:
    store = Results(file)
    for label, images in runs.items():
        store.add(
            store.open(label, {"label": label}),
            [{"image": i, "picture": i, "caption": f"{file.stem} {i}"} for i in images],
        )
    return store


def test_stores_are_merged_once(tmp_path, monkeypatch, capsys):
    """For clusters whose file system knows no locks: a store each, and one made of them."""
    store_of(tmp_path / "a.sqlite", x="ab")
    store_of(tmp_path / "b.sqlite", x="bc", y="d")
    words = [
        "results",
        "--results",
        str(tmp_path / "all.sqlite"),
        "merge",
        str(tmp_path / "a.sqlite"),
        str(tmp_path / "b.sqlite"),
    ]
    for expected in ("1 runs and 2 answers were new", "0 runs and 0 answers were new"):
        monkeypatch.setattr(sys, "argv", words)
        store_command()
        assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [expected] * 2
    both = Results(tmp_path / "all.sqlite")
    assert {run.label: [row["caption"] for row in both.rows(run)] for run in both.runs()} == {
        "x": ["a a", "a b", "b c"],
        "y": ["b d"],
    }
    (tmp_path / "text.sqlite").write_text("no store")
    for name in ("text.sqlite", "none.sqlite"):
        with pytest.raises(InputError, match=name):
            both.merge(tmp_path / name)
    with pytest.raises(InputError, match="is the store that others"):
        both.merge(both.file)
    for name in ("text.sqlite", "none.sqlite"):  # nothing is copied beside a file that is no store
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "results",
                "--results",
                str(tmp_path / "new.sqlite"),
                "merge",
                str(tmp_path / "a.sqlite"),
                str(tmp_path / name),
            ],
        )
        with pytest.raises(SystemExit, match="2"):
            store_command()
    assert not (tmp_path / "none.sqlite").exists() and not (tmp_path / "new.sqlite").exists()


def test_a_sweep_ends_in_one_table_of_its_runs(tmp_path):
    def job(number, typed, metrics):
        folder = tmp_path / str(number)
        folder.mkdir()
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        own = {"runtime": {"output_dir": str(folder)}, "job": {"num": number}}
        return JobReturn(overrides=["batch_size=2", typed], hydra_cfg=OmegaConf.create({"hydra": own}))

    def measured(value):
        found = {"f1": {"value": value, "low": value - 1, "high": value + 1}, "n": 4, "tokens_per_second": 9.96}
        return found | {"difference": {"f1": {"value": 1.0, "low": 0.0, "high": 2.0}}}

    jobs = [
        job(0, "seed=0", {"[]": measured(50.0), "[prunehal]": measured(61.0)}),
        job(1, "experiment=ranking", None),
        job(2, "seed=1", {"[]": measured(50.0), "[prunehal]": measured(72.5)}),
    ]
    console = Console(width=160, file=io.StringIO())
    sweep_table.show(console, jobs)
    out = console.file.getvalue()
    assert "2 runs of the sweep" in out and "61.0 [60.0, 62.0]" in out and "72.5 [71.5, 73.5]" in out
    assert "50.0" not in out
    assert (tmp_path / "sweep.csv").read_text().splitlines() == [
        'job,typed,stack,n,f1,"f1, low","f1, high",tokens/s',
        "#0,seed=0,[prunehal],4,61.0,60.0,62.0,10.0",
        "#2,seed=1,[prunehal],4,72.5,71.5,73.5,10.0",
    ]
    sweep_table.show(console, jobs[1:2])  # a study alone has a table of its own
    assert console.file.getvalue() == out
