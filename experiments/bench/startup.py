"""How long the command line takes to answer: `python -m experiments.bench.startup`.

Each command runs in a new process; the first run, which may compile modules, does not count. Seconds, median of the
others.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

COMMANDS = {
    "help": ["run.py", "--help"],
    "help of the results": ["-m", "experiments.results", "--help"],
    "misspelt decoder": ["run.py", "decoder=[prunhal]"],
    "misspelt model": ["run.py", "model=lava"],
    "misspelt option": ["run.py", "modle=scenes"],
    "import of the package": ["-c", "import prunehal"],
}


def seconds(words: list[str]) -> float:
    """One run's time from start to exit."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    if "Traceback" in done.stderr:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command that count (default 5)")
    repeats = parser.parse_args().repeats
    table = Table("command", "", "median s", "slowest s")
    for name, words in COMMANDS.items():
        times = [seconds(words) for _ in range(repeats + 1)][1:]
        table.add_row(name, " ".join(["python", *words]), f"{statistics.median(times):.2f}", f"{max(times):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
