"""The main job: `python run.py` describes held-out scenes with and without PruneHal, and measures hallucination."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from decoders import StackError
from experiments import overrides
from experiments.errors import InputError

failures: list[int] = []  # exit codes of jobs; one that fails does not stop the others of a multirun


@hydra.main(config_path="conf", config_name="run", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from experiments import jobs  # slow to import: after the command line has been checked

    folder, typed = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    try:
        failures.append(jobs.study(cfg, folder, typed) if cfg.experiment else jobs.job(cfg, folder))
    except hydra.errors.InstantiationException as error:
        failures.append(_say(error.__cause__ or error))
    except (InputError, StackError) as error:
        failures.append(_say(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _say(error: BaseException) -> int:
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
    return 2


if __name__ == "__main__":
    try:
        sys.argv[1:] = overrides.ordered(sys.argv[1:])
        overrides.check(sys.argv[1:])
    except InputError as error:
        raise SystemExit(_say(error)) from None
    main()
    raise SystemExit(max(failures, default=0))
