"""Trackers of accelerate that a run tells its settings and its numbers; off unless `logger=[...]` names some."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..inputs.errors import InputError
from ..results import Estimate, Sheet, flat


@contextmanager
def started(cfg: DictConfig) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that tells numbers to a config's loggers, which know the settings already and are closed in the end.

    Raises InputError, before anything else is done, for a package that is missing, or a tracker that does not start.
    """
    told = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in flat(OmegaConf.to_container(cfg, resolve=True)).items()
        if not name.startswith(("ray.", "logger."))
    }
    trackers = []
    try:
        for name, node in cfg.logger.items():
            try:
                from accelerate import PartialState

                PartialState()  # without it some of them do not log
                tracker = instantiate(node)
                _start(name, tracker)
            except (ImportError, InstantiationException) as error:
                if not isinstance(missing := error.__cause__ or error, ImportError):
                    raise
                raise InputError(
                    f"logger=[{name}] needs a package that is not installed ({missing}): pip install {name} accelerate"
                ) from error
            trackers.append(tracker)
            tracker.store_init_configuration(told)

        def log(values: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log(
                    {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in values.items() if math.isfinite(value)},
                    step=0,
                )

        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


def _start(name: str, tracker) -> None:
    """Start a tracker, again if another job made MLflow's experiment between the look for it and the making."""
    try:
        try:
            tracker.start()
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise
            tracker.start()
    except ImportError:
        raise
    except Exception as error:  # each tracker has errors of its own, as for a server that does not answer
        raise InputError(f"logger=[{name}] does not start: {error}") from error


def numbers(metrics: dict[str, dict]) -> dict[str, float]:
    """`metrics.json` in one level, `STACK/METRIC` with `/low` and `/high` beside; the empty stack is `none`."""
    return {
        f"{label.strip('[]').replace(',', '-') or 'none'}/{name.replace('.', '/').removesuffix('/value')}": float(v)
        for label, found in metrics.items()
        for name, v in flat(found).items()
    }


def table(sheet: Sheet) -> dict[str, float]:
    """The numbers of a table, by the words of their record and their column."""
    out, abouts = {}, [" ".join(v for v in record.values() if isinstance(v, str)) for record in sheet.records]
    if len(set(abouts)) < len(abouts):  # they differ in numbers
        abouts = [
            " ".join([about, *(f"{k}={v}" for k, v in record.items() if isinstance(v, (int, float)))]).strip()
            for about, record in zip(abouts, sheet.records, strict=False)
        ]
    for about, record in zip(abouts, sheet.records, strict=False):
        for column, v in record.items():
            if isinstance(v, Estimate):
                out |= {f"{about}/{column}": v.value, f"{about}/{column}/low": v.low, f"{about}/{column}/high": v.high}
            elif isinstance(v, (int, float)):
                out[f"{about}/{column}"] = float(v)
    return out
