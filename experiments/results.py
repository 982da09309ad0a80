"""The one store of all runs, and `python -m experiments.results`, which lists, filters and compares them.

An SQLite file: a run is a stack with a search on a task; an answer is kept in it once, as soon as its batch is done, in
one transaction with the rest of the batch. A killed process loses the batch it was at and nothing else; several
processes may write at once, where the file system knows locks, and where it does not, `merge` makes one store of
theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import hydra
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from decoders.errors import choices

from .errors import InputError
from .metrics import bootstrap

DEFAULT = Path("outputs/results.sqlite")
_TABLES = (
    (
        "CREATE TABLE runs (id TEXT PRIMARY KEY, created TEXT NOT NULL, label TEXT NOT NULL, config TEXT NOT NULL, code"
        " TEXT NOT NULL, versions TEXT NOT NULL)"
    ),
    (
        "CREATE TABLE answers (run TEXT NOT NULL REFERENCES runs(id), item TEXT NOT NULL, code TEXT NOT NULL, row TEXT"
        " NOT NULL, PRIMARY KEY (run, item))"
    ),
)
_COLUMNS = {"runs": ["id", "created", "label", "config", "code", "versions"], "answers": ["run", "item", "code", "row"]}
PACKAGES = ("torch", "transformers", "numpy", "pillow")


def _by_name(item: str) -> list:
    """A key to sort ids by that reads the numbers in them as numbers, `a2` before `a10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", item)]


@dataclass
class Run:
    """One run of the store.

    id: a digest of `config`, so that the same settings are the same run.
    label: its stack, as on the command line.
    config: all that decides what is answered: decoders, model, search, task (without how many), prompt, tokens, seed.
    code: the version that made the run; each answer has its own, too.
    """

    id: str
    created: str
    label: str
    config: dict
    code: str
    versions: dict
    count: int = 0


def digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@cache
def code() -> str:
    """The version of this code: git's, marked where files were changed since, or the package's."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True
        )  # not in git where it was installed
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        kinds = ("*.py", "*.yaml", "*.json")
        changed = subprocess.run([*git, "diff", "HEAD", "--", *kinds], capture_output=True, check=True).stdout
        new = subprocess.run(
            [*git, "ls-files", "-z", "--others", "--exclude-standard", "--", *kinds],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        changed += b"".join((root / name).read_bytes() for name in new if name)
        return head + (f"+{hashlib.sha256(changed).hexdigest()[:6]}" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("prunehal")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _is_store(base: sqlite3.Connection) -> bool:
    """Whether a database is one; False for an empty one. Raises DatabaseError for someone else's."""
    found: dict[str, list[str]] = {}
    for table, column in base.execute(
        "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table' ORDER BY"
        " m.name, c.cid"
    ):
        found.setdefault(table, []).append(column)
    if found and any(found.get(name) != columns for name, columns in _COLUMNS.items()):
        raise sqlite3.DatabaseError("a database of something else")
    return bool(found)


def checked(file: Path) -> Path:
    """A store, which is not touched. Raises InputError for a file that is none."""
    if not file.is_file():
        raise InputError(f"there is no store '{file}'")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=60)) as base:
            if not _is_store(base):
                raise sqlite3.DatabaseError("an empty database")
    except sqlite3.Error as error:
        raise InputError(f"'{file}' is no store of results: {error}") from error
    return file


def same_task(one: Run, two: Run) -> bool:
    """Whether two runs were asked the same, but for how much of it."""
    first, second = (
        {k: v for k, v in (run.config.get("task") or {}).items() if k not in ("start", "count")} for run in (one, two)
    )
    return first == second


def made(config: dict, kind: type) -> object:
    """The object that a stored config describes. A store may be someone else's: raises InputError unless the config
    names a class of this kind, and nothing else that is to be called.
    """
    try:
        if str(config).count("'_target_'") != 1 or not issubclass(hydra.utils.get_class(config["_target_"]), kind):
            raise InputError(f"the store's {config} describes no {kind.__name__}; nothing of it was run")
    except (ImportError, ValueError, KeyError) as error:
        raise InputError(f"the store's {config} describes no {kind.__name__} that there is here: {error}") from error
    return hydra.utils.instantiate(config)


class Results:
    """The store in a file, which is made where there is none. Raises InputError for a file that is no store, also for
    someone else's database.
    """

    def __init__(self, file: Path | str = DEFAULT):
        self.file = Path(file)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as base:
                if not _is_store(base):
                    base.execute("BEGIN IMMEDIATE")  # another process may be at it
                    if not _is_store(base):
                        for table in _TABLES:
                            base.execute(table)
                    base.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"'{file}' cannot be used as the store of results ({error}); choose another: results=FILE.sqlite"
            ) from error

    def _open(self):
        return closing(sqlite3.connect(self.file, timeout=60, isolation_level=None))

    def open(self, label: str, config: dict) -> Run:
        """The run of these settings, or, if there is none, a new one, which is kept with its first answers."""
        new = Run(
            digest(config),
            datetime.now(UTC).isoformat(timespec="seconds"),
            label,
            json.loads(json.dumps(config, sort_keys=True)),
            code(),
            versions(),
        )
        return next(iter(self.runs(new.id)), new)

    def run(self, id: str) -> Run:
        """The run whose id begins so. Raises InputError for none or several."""
        found = self.runs(id)
        if len(found) != 1:
            raise InputError(
                f"{len(found)} runs of '{self.file}' begin with '{id}'; `python -m experiments.results` lists them"
            )
        return found[0]

    def runs(self, begins: str = "") -> list[Run]:
        """The runs whose ids begin so, oldest first."""
        count = "(SELECT COUNT(*) FROM answers WHERE run = id)"
        with self._open() as base:
            found = base.execute(
                f"SELECT id, created, label, config, code, versions, {count} FROM runs WHERE substr(id, 1, ?) = ? ORDER"
                " BY created, rowid",
                (len(begins), begins),
            ).fetchall()
        return [
            Run(id, created, label, json.loads(config), made, json.loads(packages), n)
            for id, created, label, config, made, packages, n in found
        ]

    def add(self, run: Run, rows: Iterable[dict]) -> None:
        """Keep answers, all or none; an answer that is there already stays."""
        with self._open() as base:
            base.execute("BEGIN IMMEDIATE")
            base.execute(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?)",
                (
                    run.id,
                    run.created,
                    run.label,
                    json.dumps(run.config, sort_keys=True),
                    run.code,
                    json.dumps(run.versions),
                ),
            )
            base.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)",
                [(run.id, row["image"], code(), json.dumps(row)) for row in rows],
            )
            base.execute("COMMIT")

    def done(self, run: Run) -> set[str]:
        """Ids of the items that have been answered."""
        with self._open() as base:
            return {item for (item,) in base.execute("SELECT item FROM answers WHERE run = ?", (run.id,))}

    def rows(self, run: Run, ids: Iterable[str] | None = None) -> list[dict]:
        """The answers, in the order of `ids`, those that are not there left out; without ids all, by their names,
        numbers in these by value.
        """
        with self._open() as base:
            found = {item: row for item, row in base.execute("SELECT item, row FROM answers WHERE run = ?", (run.id,))}
        return [json.loads(found[i]) for i in (sorted(found, key=_by_name) if ids is None else ids) if i in found]

    def merge(self, file: Path) -> tuple[int, int]:
        """Copy what another store has and this one lacks, all or nothing; returns how many runs and answers that were.
        Raises InputError for a file that is no store, or is this one.
        """
        if checked(file).samefile(self.file):
            raise InputError(f"'{file}' is the store that others are to be merged into")
        runs, answers = "id, created, label, config, code, versions", "run, item, code, row"
        try:
            with self._open() as base:
                base.execute("ATTACH DATABASE ? AS other", (str(file),))
                base.execute("BEGIN IMMEDIATE")
                copied = [
                    base.execute(
                        f"INSERT OR IGNORE INTO main.{name} ({columns}) SELECT {columns} FROM other.{name} ORDER BY"
                        " rowid"
                    ).rowcount
                    for name, columns in (("runs", runs), ("answers", answers))
                ]
                base.execute("COMMIT")
        except sqlite3.Error as error:
            raise InputError(f"'{file}' cannot be merged into '{self.file}': {error}") from error
        return copied[0], copied[1]

    def codes(self, runs: Iterable[str]) -> Counter[str]:
        """How many answers of some runs, by id, each version of the code has made."""
        out: Counter[str] = Counter()
        with self._open() as base:
            for run in runs:
                out.update(dict(base.execute("SELECT code, COUNT(*) FROM answers WHERE run = ? GROUP BY code", (run,))))
        return out


def described(config: dict) -> dict[str, str]:
    """A run's settings in words, for tables and filters: its decoders, kind of search, task, model, prompt, folder."""
    task, decoders, search, model = (config.get(k) or {} for k in ("task", "decoder", "search", "model"))
    kind = (
        ""
        if not search
        else "beam"
        if search.get("num_beams", 1) != 1
        else "sampling"
        if search.get("do_sample")
        else "greedy"
    )
    return {
        "decoder": f"[{','.join(decoders)}]" if isinstance(decoders, dict) else str(decoders),
        "search": " ".join([kind, *(f"{k}={v}" for k, v in search.items())]).strip(),
        "task": (
            " ".join(
                [
                    str(task.get("_target_", "")).rsplit(".", 1)[-1],
                    *(f"{k}={v}" for k, v in task.items() if k != "_target_"),
                ]
            ).strip()
        ),
        "model": str(model.get("path")) if isinstance(model, dict) else str(model),
        "prompt": str((model.get("prompt") if isinstance(model, dict) else None) or config.get("prompt")),
        "folder": config.get("folder", ""),
    }


def flat(tree: dict, name: str = "") -> dict[str, object]:
    """The leaves of a tree by their names with dots."""
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= flat(value, f"{name}{key}.") if isinstance(value, dict) and value else {name + key: value}
    return out


def settings(config: dict) -> dict[str, object]:
    """A run's settings by their names on run.py's command line (`decoder.NAME.option`), but for the folder and digests
    of files.
    """
    return {
        k: v
        for k, v in flat(config).items()
        if v != {} and not {"folder", "files", "adapter files"} & set(k.split("."))
    }


def differing(runs: list[Run]) -> list[dict[str, str]]:
    """Of each run the settings that have other values in some of the runs that have them."""
    known = [{k: str(v) for k, v in settings(run.config).items()} for run in runs]
    values: dict[str, set[str]] = {}
    for one in known:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    return [{k: v for k, v in one.items() if len(values[k]) > 1} for one in known]


def matching(runs: list[Run], filters: list[str]) -> list[Run]:
    """Runs that hold every filter: `text`, whole words of any of `described`; `key=text`, of one of these; id and code,
    by how they begin; `option=value`, as on run.py's command line.

    Raises InputError for a key that there is not.
    """
    words = {run.id: described(run.config) | {"id": run.id, "code": run.code} for run in runs}
    options = {run.id: settings(run.config) for run in runs}
    keys = {k for one in (*words.values(), *options.values()) for k in one}

    def holds(run: Run, one: str) -> bool:
        key, equals, text = one.partition("=")
        if key in ("id", "code"):
            return words[run.id][key].startswith(text)
        if not equals or key in words[run.id]:
            return bool(
                re.search(
                    rf"(?<!\w){re.escape(text if equals else one)}(?!\w)",
                    words[run.id][key] if equals else " ".join(words[run.id].values()),
                )
            )
        return key in options[run.id] and options[run.id][key] == yaml.safe_load(text)

    for one in filters:
        key, equals, _ = one.partition("=")
        if runs and equals and key not in keys:
            raise InputError(choices(key, keys, "filter"))
    return [run for run in runs if all(holds(run, one) for one in filters)]


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
    for name in ("id", "begun", "answers", "decoder", "search", "settings that differ", "code"):
        out.add_column(name, no_wrap=name in ("id", "begun", "answers"), overflow="fold")
    for run, words, own in zip(runs, told, differ, strict=False):
        short = {
            k.removeprefix("decoder."): v if len(v) < 40 else v[:39] + "…"
            for k, v in own.items()
            if not k.startswith("search.")
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
                    apart,
                    run.code[:7],
                )
            )
        )
    console.print(out)


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
    from .tasks import Task  # slow to import

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
        cells = [f"{v[metric]['value']:.1f} [{v[metric]['low']:.1f}, {v[metric]['high']:.1f}]" for v in levels]
        d = gap[metric]
        out.add_row(
            *(
                Text(v)
                for v in (title, *cells, f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]", f"{d['p']:.3g}")
            )
        )
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
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
