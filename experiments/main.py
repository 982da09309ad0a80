"""The command line: `python run.py` in the tree, `prunehal` once installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from decoders import StackError

from . import overrides
from .errors import InputError

failures: list[int] = []  # exit codes of jobs; one that fails does not stop the others of a multirun


class Foreign(SearchPathPlugin):
    """The `conf` folders of other packages, which Hydra finds as it finds ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name, folder in overrides.foreign().items():
            search_path.append(name, f"file://{folder}")


@hydra.main(config_path=str(overrides.CONF), config_name="run", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from . import jobs  # slow to import: after the command line has been checked

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


def command() -> None:
    """Check what was typed, run it, and exit with the worst code of its jobs."""
    try:
        sys.argv[1:] = overrides.ordered(sys.argv[1:])
        overrides.check(sys.argv[1:])
    except InputError as error:
        raise SystemExit(_say(error)) from None
    Plugins.instance().register(Foreign)
    main()
    raise SystemExit(max(failures, default=0))
