"""`python -m experiments.results` lists, filters, compares and merges the runs of the store."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..inputs.errors import InputError, say
from ..metrics import bootstrap
from .query import described, differing, made, matching, same_task, settings
from .sheets import Estimate
from .store import DEFAULT, Results, Run, checked


def _show(console: Console, runs: list[Run]) -> None:
    """What all share above the table, what differs in it."""
    told = [described(run.config) for run in runs]
    shared = {
        k: v
        for k in ("search", "task", "model", "prompt")
        for v in {one[k] for one in told}
        if v and all(one[k] == v for one in told)
    }
    differ = differing(runs)
    for run, own in zip(runs, differ, strict=False):
        for name, options in (
            (run.config.get("decoder") or {}).items() if isinstance(run.config.get("decoder"), dict) else ()
        ):
            shared[name] = " ".join(
                f"{k}={v}" for k, v in options.items() if k != "_target_" and f"decoder.{name}.{k}" not in own
            )
    out = Table(
        title=Text(f"{len(runs)} runs"),
        caption=Text("\n".join(f"all: {k} {v}" for k, v in shared.items())),
        caption_justify="left",
    )
    for name in ("id", "begun", "answers", "decoder", "search", "task", "settings that differ", "code"):
        out.add_column(name, no_wrap=name in ("id", "begun", "answers"), overflow="fold")
    for run, words, own in zip(runs, told, differ, strict=False):
        short = {
            k.removeprefix("decoder."): v if len(v) < 40 else v[:39] + "…"
            for k, v in own.items()
            if not k.startswith(("search.", "task."))
        }
        apart = " ".join(f"{k}={v}" for k, v in short.items())
        out.add_row(
            *(
                Text(v)
                for v in (
                    run.id,
                    run.created[:16].replace("T", " "),
                    str(run.count),
                    run.label,
                    words["search"].partition(" ")[0],
                    _task(run, own),
                    apart,
                    run.code[:7],
                )
            )
        )
    console.print(out)


def _task(run: Run, own: dict[str, str]) -> str:
    """The kind of a run's task, and those of its options in which runs differ."""
    kind = str((run.config.get("task") or {}).get("_target_", "")).rpartition(".")[2]
    apart = {k.removeprefix("task."): v for k, v in own.items() if k.startswith("task.")}
    return " ".join([kind or "images", *(f"{k}={v}" for k, v in apart.items() if k != "_target_")])


def _compare(console: Console, store: Results, one: Run, two: Run) -> None:
    """The second minus the first on the answers that both have, with what the task measures."""
    a, b = store.rows(one), {row["image"]: row for row in store.rows(two)}
    pairs = [(row, b[row["image"]]) for row in a if row["image"] in b]
    if not pairs:
        raise InputError(f"runs {one.id} and {two.id} have no picture in common")
    if not same_task(one, two) or "_target_" not in (one.config.get("task") or {}):
        raise InputError(
            f"only runs of one task can be compared: {one.id} is on {described(one.config)['task']}, {two.id} on"
            f" {described(two.config)['task']}"
        )
    from ..tasks import Task  # slow to import

    asked = made(one.config["task"], Task)
    tables = [asked.counts(asked.scored(rows)) for rows in zip(*pairs, strict=False)]
    groups = [row["picture"] for row in asked.scored([row for row, _ in pairs])]
    levels = [bootstrap.summary(table, asked.rates, groups) for table in tables]
    gap = bootstrap.difference(tables[1], tables[0], asked.rates, groups)
    for run, other in ((one, two), (two, one)):
        theirs = settings(other.config)
        own = {
            k: v
            for k, v in settings(run.config).items()
            if (k not in theirs or theirs[k] != v) and not k.endswith("_target_")
        }
        console.print(Text(" ".join([run.id, run.label, *(f"{k}={v}" for k, v in own.items())])), soft_wrap=True)
    asked_of = f"n = {len(set(groups))} pictures" + (
        f", {len(pairs)} questions" if len(pairs) > len(set(groups)) else ""
    )
    out = Table(title=Text(f"{asked_of}; 95 % intervals, bootstrap over pictures"))
    for name in ("", f"{one.id} {one.label}", f"{two.id} {two.label}", "difference", "p"):
        out.add_column(Text(name), justify="right")
    for metric, title in asked.metrics.items():
        cells = [str(Estimate.of(v[metric])) for v in levels] + [str(Estimate.of(gap[metric], "+"))]
        out.add_row(*map(Text, (title, *cells, f"{gap[metric]['p']:.3g}")))
    console.print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="List, filter and compare the runs of the store.")
    parser.add_argument("--results", type=Path, default=DEFAULT, help=f"the store (default: {DEFAULT})")
    commands = parser.add_subparsers(dest="command")
    listed = commands.add_parser("list", help="runs, those that hold every filter")
    listed.add_argument(
        "filters",
        nargs="*",
        help=(
            f"text, or key=text with one of: id, code, {', '.join(described({}))}, or an option as run.py has it:"
            " task.split=test, decoder.NAME.OPTION=VALUE"
        ),
    )
    shown = commands.add_parser("show", help="a run's settings")
    shown.add_argument("run", help="its id, or how it begins")
    compared = commands.add_parser("compare", help="two runs on the pictures that both have")
    compared.add_argument("run", nargs=2, help="ids, or how they begin; the second minus the first")
    exported = commands.add_parser("export", help="a run's answers, a JSON line each")
    exported.add_argument("run")
    merged = commands.add_parser(
        "merge", help="copy what other stores have and this one lacks; it is made if there is none"
    )
    merged.add_argument("files", nargs="+", type=Path, metavar="OTHER.sqlite")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)
    try:
        for file in getattr(args, "files", []):  # nothing is copied if one of them is no store
            checked(file)
        if not args.results.exists() and args.command != "merge":
            raise InputError(
                f"there is no store '{args.results}' yet; run.py makes it, or name another: --results FILE.sqlite"
            )
        store = Results(args.results)
        if args.command == "show":
            console.print_json(json.dumps(vars(store.run(args.run))))
        elif args.command == "compare":
            _compare(console, store, *(store.run(r) for r in args.run))
        elif args.command == "merge":
            for file in args.files:
                console.print(
                    "{}: {} runs and {} answers were new".format(file, *store.merge(file)),
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        elif args.command == "export":
            for row in store.rows(store.run(args.run)):
                print(json.dumps(row))
        else:
            filters, runs = getattr(args, "filters", []), store.runs()
            found = matching(runs, filters)
            _show(console, found)
            for one in filters if not found else ():
                console.print(f"{len(matching(runs, [one]))} of {len(runs)} runs hold {one}", markup=False)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        raise SystemExit(say(error)) from None


if __name__ == "__main__":
    main()
