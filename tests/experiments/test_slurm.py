"""A sweep through a real Slurm: jobs that it kills, queues again and starts again answer nothing twice."""

import re
import signal
import time

import pytest
import slurm
from sweep_commands import kept, plain, run, said, start, sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.missing()), reason=f"needs Slurm; not installed: {', '.join(slurm.missing())}"),
]
JOB = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]  # of two processors and 8 GB
PICTURES = 60  # more than a job answers in the two seconds that Slurm leaves it after SIGTERM
WORDS = ["compare=false", f"task.count={PICTURES}", "batch_size=1", "max_new_tokens=20"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a Slurm of this machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    with slurm.started(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def restarts(cluster, job: str) -> int:
    return int(re.search(r"Restarts=(\d+)", slurm.ask(cluster, "scontrol", "show", "job", job))[1])


def answers_by_run(store) -> list[int]:
    runs = [row[1] for row in kept(store)]
    return [runs.count(one) for one in set(runs)]


def wait_for(true, process) -> None:
    until = time.time() + 300
    while not true() and time.time() < until and process.poll() is None:
        time.sleep(0.05)
    assert true(), process.communicate(timeout=60) if process.poll() is not None else "not in five minutes"


def test_jobs_that_slurm_kills_and_starts_again_go_on(tmp_path, cluster):
    """One is killed as a preemption kills it, one is told before, as at its time limit."""
    folder, store = tmp_path / "sweep", tmp_path / "results.sqlite"
    both = ["decoder=[],[prunehal]", *WORDS]
    process = start(*sweep(folder, "hydra/launcher=slurm", *JOB, *both), env=cluster)
    try:
        wait_for(lambda: len(answers := answers_by_run(store)) == 2 and min(answers) >= 2, process)
        first = min(path.name for path in (folder / ".submitit").iterdir() if path.is_dir()).partition("_")[0]
        before = kept(store)
        assert slurm.ask(cluster, "scontrol", "requeue", f"{first}_0") == ""
        assert slurm.ask(cluster, "scancel", "--signal=USR2", f"{first}_1") == ""
        out, errors = process.communicate(timeout=300)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == 0, out + errors
    after = kept(store)
    assert after[: len(before)] == before and len(after) == 2 * PICTURES == len({row[1:3] for row in after})
    for number in "01":
        assert restarts(cluster, f"{first}_{number}") == 1
        told = (folder / f".submitit/{first}_{number}/{first}_{number}_0_log.out").read_text()
        [there, again] = told.split(f" of {PICTURES} answers are in the store")
        left = PICTURES - int(there.split()[-1])
        assert 0 < left <= PICTURES - 2 and f" {left}/{left} " in again, told
    one_by_one = sweep(tmp_path / "one_by_one", *both)
    code, out, errors = run(*one_by_one[:-1], f"results={tmp_path}/one_by_one.sqlite")
    assert code == 0, out + errors
    for number in "01":
        assert said(folder / number) == [plain(row) for row in said(tmp_path / "one_by_one" / number)]


def test_a_job_that_is_out_of_time_too_often_fails_and_keeps_its_answers(tmp_path, cluster):
    """Below ten minutes submitit takes every signal for the time limit's."""
    folder, store = tmp_path / "sweep", tmp_path / "results.sqlite"
    limit = ["hydra.launcher.timeout_min=5", "hydra.launcher.max_num_timeout=0"]
    words = sweep(folder, "hydra/launcher=slurm", *JOB, *limit, *WORDS, "decoder=[prunehal]")
    process = start(*words, env=cluster)
    try:
        wait_for(lambda: kept(store), process)
        [job] = [path.name for path in (folder / ".submitit").iterdir() if path.is_dir()]
        slurm.ask(cluster, "scancel", "--signal=USR2", job)
        out, errors = process.communicate(timeout=300)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.returncode == 2 and "1 of 1 jobs failed: #0" in errors and "Traceback" not in out + errors
    assert "timed-out too many times" in (folder / f".submitit/{job}/{job}_0_log.err").read_text()
    assert 0 < len(kept(store)) < PICTURES


def test_what_slurm_refuses_ends_in_its_words(tmp_path, cluster):
    words = sweep(tmp_path / "sweep", "hydra/launcher=slurm", *JOB, *WORDS, "hydra.launcher.partition=none")
    code, out, errors = run(*words, env=cluster)
    assert code == 2 and "invalid partition specified: none" in errors and "Traceback" not in out + errors
