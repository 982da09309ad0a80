"""What batches that stay full would bring: `python -m experiments.bench.lanes`.

A batch runs until its longest answer ends; the lanes of shorter ones stand idle. From the lengths of the answers in a
store, this counts the steps of fixed batches, of batches of images sorted by the length of their answers (which nobody
knows beforehand: a bound), and of lanes that take the next image as soon as one ends. On a GPU, where a step of few
rows takes as long as one of many, throughput is in proportion.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.errors import InputError
from experiments.results import DEFAULT, Results


def fixed(lengths: Sequence[int], batch: int) -> int:
    """Steps of batches of so many, one after the other."""
    return sum(max(lengths[at : at + batch]) for at in range(0, len(lengths), batch))


def full(lengths: Sequence[int], batch: int) -> int:
    """Steps of so many lanes, each of which takes the next answer as soon as its own has ended."""
    ends = [0] * batch
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.lanes", description=__doc__.split("\n\n")[1])
    parser.add_argument("--results", default=DEFAULT, help="the store; default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="images at once; default: 8 16 32")
    args = parser.parse_args()
    if min(args.batch) < 1:
        parser.error("--batch: images at once, 1 or more")
    try:
        store = Results(args.results)
        runs = store.runs()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    table = Table("run", "answers", "tokens", "batch", "fixed", "sorted", "full", title="steps, against fixed batches")
    for run in runs:
        lengths = [row["tokens"] for row in store.rows(run) if row.get("tokens")]
        for batch in args.batch if lengths else ():
            base = fixed(lengths, batch)
            ratios = (fixed(sorted(lengths), batch) / base, full(lengths, batch) / base)
            mean = f"{sum(lengths) / len(lengths):.0f} ({min(lengths)}-{max(lengths)})"
            cells = (escape(run.label), str(len(lengths)), mean, str(batch), str(base), *(f"{r:.2f}" for r in ratios))
            table.add_row(*cells)
    if not table.row_count:
        raise SystemExit(f"error: the store {args.results} holds no answers; python run.py makes some")
    Console().print(table)


if __name__ == "__main__":
    main()
