"""The table of all runs of a sweep, shown when it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from rich.console import Console
from rich.text import Text

from ..results import Estimate, Sheet

FILE = "sweep.csv"  # in the sweep's folder


def show(console: Console, jobs: Sequence[JobReturn]) -> None:
    """Print and write a line a run: where its words differ from those of others, and what was measured of its stack.
    Studies, which have a table of their own, are left out.
    """
    typed = [set(job.overrides or ()) for job in jobs]
    shared = set.intersection(*typed) if len(typed) > 1 else set()
    records = [record for job in jobs if (record := _record(job, shared)) is not None]
    if not records:
        return
    from .display import sheet  # slow to import

    table = Sheet(f"{len(records)} runs of the sweep", records)
    file = Path(os.path.commonpath([_folder(job).parent for job in jobs])) / FILE
    table.write(file)
    sheet(console, table)
    console.print(Text(f"all runs with their intervals: {file}"), soft_wrap=True)


def _folder(job: JobReturn) -> Path:
    return Path(job.hydra_cfg.hydra.runtime.output_dir)


def _record(job: JobReturn, shared: set[str]) -> dict | None:
    """The line of one job, or None where it left no numbers; metrics by the names that `objective` takes.

    Args:
        shared: words that are the same in every job.
    """
    file = _folder(job) / "metrics.json"
    if not file.is_file():
        return None
    stack, values = list(json.loads(file.read_text()).items())[-1]  # before it, what it was compared with
    scored = {k: Estimate.of(v) for k, v in values.items() if isinstance(v, dict) and "value" in v}
    own = " ".join(word for word in job.overrides or () if word not in shared)
    numbers = {"n": values.get("n", 0)} | scored | {"tokens/s": round(values["tokens_per_second"], 1)}
    return {"job": f"#{job.hydra_cfg.hydra.job.num}", "typed": own, "stack": stack} | numbers
