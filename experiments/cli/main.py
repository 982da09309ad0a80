"""The command line: `python run.py` in the tree, `prunehal` once installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from decoders import StackError

from ..inputs import conf_files
from ..inputs.errors import InputError, say
from . import arguments, help

GO_ON = (  # where Slurm refused the jobs, or one ended with no result, as one that was cancelled
    "Jobs that were submitted go on (squeue --me); what is done is kept, and the same command with the same"
    " hydra.sweep.dir=FOLDER goes on from there."
)
failures: list[int] = []  # exit codes of jobs; one that fails does not stop the others of a multirun
ran: list[JobReturn] = []  # the jobs of a multirun that were not refused


@hydra.main(config_path=str(conf_files.CONF), config_name="run", version_base="1.3")
def main(cfg: DictConfig) -> tuple[int, float | None]:
    """A job; returns its exit code, and what a sweeper takes for its result."""
    from . import job, study  # slow to import: after the command line has been checked

    folder, typed, value = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task), None
    try:
        code, value = (study.study(cfg, folder, typed), None) if cfg.experiment else job.job(cfg, folder)
    except hydra.errors.InstantiationException as error:
        code = say(error.__cause__ or error)
    except (InputError, StackError) as error:
        code = say(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not _of_submitit(error):
            raise
        code = say(error)  # out of time more often than the launcher allows
    failures.append(code)
    own = HydraConfig.get()
    if (
        own.mode == RunMode.RUN
        and not any(word.startswith("hydra.run.dir") for word in own.overrides.hydra)
        and not any(folder.iterdir())
    ):
        folder.rmdir()  # made by Hydra for what was refused, or was a dry run
    return code, value


class Heard(Launcher):
    """A launcher whose jobs' exit codes are heard, also of those that ran in other processes; sweepers get the
    values.
    """

    def __init__(self, launcher: Launcher):
        self.launcher = launcher

    def setup(self, **given) -> None:
        self.launcher.setup(**given)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            ended, failed = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx), []
        except RuntimeError as error:
            if not _of_submitit(error):
                raise
            raise SystemExit(say(InputError(f"{str(error).strip()}\n{GO_ON}"))) from None
        for number, job in enumerate(ended, initial_job_idx):
            if job.status == JobStatus.COMPLETED:  # what has failed raises where the sweeper looks at it
                code, job.return_value = job.return_value
                failures.append(code)
                if code < 2:
                    ran.append(job)
                failed += [f"#{number}"] * bool(code)
        if failed:
            count = f"{len(failed)} of {len(ended)} jobs failed"
            say(InputError(f"{count}: {', '.join(failed)}; their output says why"))
        searches = any(word.startswith("objective=") for words in job_overrides for word in words)
        if searches and not ran and all(job.status == JobStatus.COMPLETED for job in ended):
            raise SystemExit(max(failures))  # what was typed cannot run, so a search would find nothing
        return ended


def _hear_launchers() -> None:
    made = Plugins.instantiate_launcher
    Plugins.instantiate_launcher = lambda *args, **given: Heard(made(*args, **given))


def _of_submitit(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "submitit"


def command() -> None:
    """Check what was typed, run it, and exit with the worst code of its jobs."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help.text(Path(sys.argv[0]).name, sys.argv[1:]))
            return
        if "--version" in sys.argv[1:]:
            print(help.version())
            return
        sys.argv[1:] = arguments.ordered(sys.argv[1:])
        arguments.check(sys.argv[1:])
    except InputError as error:
        raise SystemExit(say(error)) from None
    Plugins.instance().register(conf_files.Foreign)
    _hear_launchers()
    ran.clear()
    try:
        main()
    except KeyboardInterrupt:  # while jobs ran in other processes
        raise SystemExit(130) from None
    if ran:
        from . import sweep  # slow to import

        sweep.show(Console(), ran)
    raise SystemExit(max(failures, default=0))
