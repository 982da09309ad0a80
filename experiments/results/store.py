"""The one store of all runs: an SQLite file.

A run is a stack with a search on a task; an answer is kept in it once, as soon as its batch is done, in one transaction
with the rest of the batch. A killed process loses the batch it was at and nothing else; several processes may write at
once, where the file system knows locks, and where it does not, `merge` makes one store of theirs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from ..inputs.errors import InputError

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


_MOVED = {
    "experiments.watch.Watch": "experiments.probes.watch.Watch"
}  # classes, by the names that stored runs may have
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
    root = Path(__file__).resolve().parents[2]
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


def _rename(base: sqlite3.Connection) -> None:
    """Give runs of classes that have moved the names and the ids that they would get today; nothing, where there are
    none. Answers that a run of today has already stay as they are.
    """
    old = " OR ".join("instr(config, ?)" for _ in _MOVED)
    names = [json.dumps(name) for name in _MOVED]
    if base.execute(f"SELECT 1 FROM runs WHERE {old}", names).fetchone() is None:
        return
    base.execute("BEGIN IMMEDIATE")  # what another process has renamed by now is not found
    for id, config in base.execute(f"SELECT id, config FROM runs WHERE {old}", names).fetchall():
        for before, now in _MOVED.items():
            config = config.replace(json.dumps(before), json.dumps(now))
        today = digest(json.loads(config))
        base.execute(
            "INSERT OR IGNORE INTO runs SELECT ?, created, label, ?, code, versions FROM runs WHERE id = ?",
            (today, config, id),
        )
        base.execute("UPDATE OR IGNORE answers SET run = ? WHERE run = ?", (today, id))
        base.execute("DELETE FROM answers WHERE run = ?", (id,))
        base.execute("DELETE FROM runs WHERE id = ?", (id,))
    base.execute("COMMIT")


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
                _rename(base)
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
                _rename(base)
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
