"""What batches that stay full would bring: `python -m experiments.bench.lanes`.

A batch runs until its longest answer ends; the lanes of shorter ones stand idle. From the lengths of the answers in a
store, this counts the steps of batches in the order of the images; of batches by expected length, as `group_by_length`
makes them, where another run of the store tells what to expect; of batches by the lengths themselves, which nobody
knows beforehand: a bound; and of lanes that take the next image as soon as one ends. On a GPU, where a step of few rows
takes as long as one of many, throughput is in proportion.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.inputs.errors import InputError
from experiments.results import DEFAULT, Results
from experiments.runner.batches import expected_lengths, longest_first

COLUMNS = ("run", "answers", "tokens", "batch", "steps", "by expected length", "by length", "full lanes")


def fixed(lengths: Sequence[int], batch: int) -> int:
    """Steps of batches of so many, one after the other."""
    return sum(max(lengths[at : at + batch]) for at in range(0, len(lengths), batch))


def grouped(lengths: Mapping[str, int], expected: Mapping[str, int], batch: int) -> int:
    """Steps of batches by expected length.

    Args:
        lengths: tokens by id.
        expected: the same, of one of these ids or more.
    """
    return fixed([lengths[i] for i in longest_first(list(lengths), expected)], batch)


def full(lengths: Sequence[int], batch: int) -> int:
    """Steps of so many lanes, each of which takes the next answer as soon as its own has ended."""
    ends = [0] * batch
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def cells(lengths: Mapping[str, int], expected: Mapping[str, int], batch: int) -> list[str]:
    """The steps in the order of the images, and the others' ratios to them."""
    known = list(lengths.values())
    base = fixed(known, batch)
    guess = f"{grouped(lengths, expected, batch) / base:.2f}" if expected else "-"
    return [str(base), guess, f"{grouped(lengths, lengths, batch) / base:.2f}", f"{full(known, batch) / base:.2f}"]


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
    table = Table(*COLUMNS, title="steps; those of other batches as a share of these")
    for run in runs:
        lengths = {row["image"]: row["tokens"] for row in store.rows(run) if row.get("tokens")}
        if not lengths:
            continue
        expected, known = expected_lengths(store, run, list(lengths)), lengths.values()
        mean = f"{sum(known) / len(known):.0f} ({min(known)}-{max(known)})"
        for batch in args.batch:
            table.add_row(escape(run.label), str(len(known)), mean, str(batch), *cells(lengths, expected, batch))
    if not table.row_count:
        raise SystemExit(f"error: the store {args.results} holds no answers; python run.py makes some")
    Console().print(table)


if __name__ == "__main__":
    main()
