"""The table of all runs of a sweep, shown when it ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from rich.console import Console
from rich.text import Text

from ..results import Estimate, Sheet

FILE = "sweep.csv"  # in the sweep's folder


def show(console: Console, jobs: Sequence[JobReturn]) -> None:
    """Print and write a line a run: what was typed for it, and what was measured of its stack. Studies, which have a
    table of their own, are left out.
    """
    records = [record for job in jobs if (record := _record(job)) is not None]
    if not records:
        return
    from .display import sheet  # slow to import

    table = Sheet(f"{len(records)} runs of the sweep", records)
    file = Path(jobs[0].hydra_cfg.hydra.sweep.dir).resolve() / FILE
    table.write(file)
    sheet(console, table)
    console.print(Text(f"all runs with their intervals: {file}"), soft_wrap=True)


def _record(job: JobReturn) -> dict | None:
    """The line of one job, or None where it left no numbers; metrics by the names that `objective` takes."""
    file = Path(job.hydra_cfg.hydra.runtime.output_dir) / "metrics.json"
    if not file.is_file():
        return None
    stack, values = list(json.loads(file.read_text()).items())[-1]  # before it, what it was compared with
    scored = {k: Estimate.of(v) for k, v in values.items() if isinstance(v, dict) and "value" in v}
    typed = " ".join(job.overrides or ())
    numbers = {"n": values.get("n", 0)} | scored | {"tokens/s": round(values["tokens_per_second"], 1)}
    return {"job": f"#{job.hydra_cfg.hydra.job.num}", "typed": typed, "stack": stack} | numbers
