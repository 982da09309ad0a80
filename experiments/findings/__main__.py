"""Write what the studies show, in two steps.

`tables` writes, of each study that a store holds completely, NAME-1.csv and on, NAME.png and NAME.json into
docs/results; the files of other studies stay as they are. `page` writes docs/results.md from docs/results.in.md and
the files in docs/results, and docs/results/README.md, a list of these files; it needs no store.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..inputs import conf_files
from ..inputs.errors import InputError, say
from ..results import DEFAULT, Results, checked
from . import DOCS, RESULTS
from .page import index, page
from .tables import write_tables


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m experiments.findings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = out.add_subparsers(dest="step", required=True)
    tables = steps.add_parser("tables", help="the csv files and plots, of a store")
    tables.add_argument("studies", nargs="*", metavar="STUDY", help="of conf/experiment (default: all)")
    tables.add_argument("--results", type=Path, default=DEFAULT, help=f"the store (default: {DEFAULT})")
    steps.add_parser("page", help="docs/results.md, of the csv files")
    return out


def main(argv: list[str] | None = None) -> None:
    args, console = parser().parse_args(argv), Console(stderr=True)
    try:
        if not RESULTS.is_dir():
            raise InputError(f"there is no folder '{RESULTS}': results are written in a checkout of the repository")
        if args.step == "tables":
            names = args.studies or list(conf_files.files("experiment"))
            write_tables(names, Results(checked(args.results)), console, RESULTS)
        else:
            for file, text in (
                ("results.md", page(DOCS / "results.in.md", RESULTS)),
                ("results/README.md", index(RESULTS)),
            ):
                (DOCS / file).write_text(text)
                console.print(Text(f"written: {DOCS / file}"))
    except InputError as error:
        raise SystemExit(say(error)) from None


if __name__ == "__main__":
    main()
