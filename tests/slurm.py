"""A Slurm of one machine in a folder: munge, a controller and a node daemon, all as the user who starts it.

`python tests/slurm.py FOLDER` keeps one up until Ctrl-C, for a try of docs/experiments.md without a cluster; Debian's
packages are `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
ENDS = {signal.SIGINT, signal.SIGTERM}
DEVICES = ("/dev/null", "/dev/zero")  # stand in for GPUs: Slurm counts files
CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
GresTypes=gpu
MpiDefault=none
JobRequeue=1
KillWait=2
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
PartitionName=gpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that are not installed."""
    return [name for name in PROGRAMS if not find(name)]


def find(name: str) -> str | None:
    """Where a program is, also those for administrators, whose folder is in few users' PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))


@contextmanager
def started(folder: Path, cpus: int = 2, memory: int = 8192) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` and the others speak to a Slurm in a folder, which ends with the block.

    Args:
        folder: made if it is not there; holds its settings, state and logs.
        cpus: of its one node, which also says that it has two GPUs.
        memory: MB that the node says it has.

    Raises:
        TimeoutError: it was not ready in a minute; the logs in the folder say why.
    """
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONF.format(
            host=host,
            ports=free_ports(2),
            user=getpass.getuser(),
            folder=folder,
            cpus=cpus,
            gpus=len(DEVICES),
            memory=memory,
        )
    )
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in DEVICES))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with ExitStack() as daemons:
        own = {
            "key-file": key,
            "socket": folder / "munge.socket",
            "pid-file": folder / "munge.pid",
            "log-file": folder / "munge.log",
            "seed-file": folder / "munge.seed",
        }
        words = [f"--{option}={file}" for option, file in own.items()]
        daemons.enter_context(_running(folder, env, "munged", "--foreground", "--force", *words))
        _wait(own["socket"].exists, folder)
        daemons.enter_context(_running(folder, env, "slurmctld", "-D", "-c"))
        daemons.enter_context(_running(folder, env, "slurmd", "-D", "-N", host))
        _wait(lambda: "idle" in ask(env, "sinfo", "--noheader", "--format=%T"), folder)
        try:
            yield env
        finally:  # jobs outlive the daemons
            ask(env, "scancel", "--me")
            _wait(lambda: not ask(env, "squeue", "--noheader"), folder)


def ask(env: dict[str, str], *words: str) -> str:
    """What a program of Slurm says, its errors too."""
    return subprocess.run(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    ).stdout


@contextmanager
def _running(folder: Path, env: dict[str, str], name: str, *words: str) -> Iterator[None]:
    with (folder / f"{name}.out").open("w") as out:
        process = subprocess.Popen([find(name), *words], env=env, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait(ready, folder: Path) -> None:
    until = time.time() + 60
    while not ready():
        if time.time() > until:
            raise TimeoutError(f"Slurm is not ready after a minute; see {folder}/*.log and *.out")
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nothing listens at."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(closing(socket.socket())) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    if lacking := missing():
        raise SystemExit(f"not installed: {', '.join(lacking)}; on Debian: apt-get install slurm-wlm munge")
    with started(Path(sys.argv[1])) as env:
        print(f"export SLURM_CONF={env['SLURM_CONF']}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        signal.sigwait(ENDS)
