"""The one store of all runs, and `python -m experiments.results`, which lists, filters and compares them.

An SQLite file: a run is a stack with a search on a task; an answer is kept in it once, as soon as its batch is done, in one transaction with the rest
of the batch. A killed process loses the batch it was at and nothing else; several processes may write at once, where the file system knows locks.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sqlite3
import subprocess
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import InputError

DEFAULT = Path("outputs/results.sqlite")
_TABLES = """
CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, created TEXT NOT NULL, label TEXT NOT NULL, config TEXT NOT NULL, code TEXT NOT NULL, versions TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (run TEXT NOT NULL REFERENCES runs(id), item TEXT NOT NULL, code TEXT NOT NULL, row TEXT NOT NULL, PRIMARY KEY (run, item));
"""
PACKAGES = ("torch", "transformers", "numpy", "pillow")


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
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "HEAD", "--", "*.py"], capture_output=True, check=True).stdout
        return head + (f"+{hashlib.sha256(changed).hexdigest()[:6]}" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("prunehal")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


class Results:
    """The store in a file, which is made where there is none. Raises InputError for a file that is no store."""

    def __init__(self, file: Path | str = DEFAULT):
        self.file = Path(file)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as base:
                base.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"'{file}' cannot be used as the store of results ({error}); choose another: results=FILE.sqlite") from error

    def _open(self):
        return closing(sqlite3.connect(self.file, timeout=60, isolation_level=None))

    def open(self, label: str, config: dict) -> Run:
        """The run of these settings; begun if there is none."""
        made = (digest(config), datetime.now(UTC).isoformat(timespec="seconds"), label, json.dumps(config, sort_keys=True), code(), json.dumps(versions()))
        with self._open() as base:
            base.execute("INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?)", made)
        return self.run(made[0])

    def run(self, id: str) -> Run:
        """The run whose id begins so. Raises InputError for none or several."""
        found = [run for run in self.runs() if run.id.startswith(id)]
        if len(found) != 1:
            raise InputError(f"{len(found)} runs of '{self.file}' begin with '{id}'; `python -m experiments.results` lists them")
        return found[0]

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        with self._open() as base:
            counted = dict(base.execute("SELECT run, COUNT(*) FROM answers GROUP BY run"))
            found = base.execute("SELECT id, created, label, config, code, versions FROM runs ORDER BY created, rowid").fetchall()
        return [Run(id, created, label, json.loads(config), made, json.loads(packages), counted.get(id, 0)) for id, created, label, config, made, packages in found]

    def add(self, run: Run, rows: Iterable[dict]) -> None:
        """Keep answers, all or none; an answer that is there already stays."""
        with self._open() as base:
            base.execute("BEGIN IMMEDIATE")
            base.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", [(run.id, row["image"], code(), json.dumps(row)) for row in rows])
            base.execute("COMMIT")

    def done(self, run: Run) -> set[str]:
        """Ids of the items that have been answered."""
        with self._open() as base:
            return {item for (item,) in base.execute("SELECT item FROM answers WHERE run = ?", (run.id,))}

    def rows(self, run: Run, ids: Iterable[str] | None = None) -> list[dict]:
        """The answers, in the order of `ids`, those that are not there left out; without ids all, as they came."""
        with self._open() as base:
            found = {item: row for item, row in base.execute("SELECT item, row FROM answers WHERE run = ? ORDER BY rowid", (run.id,))}
        return [json.loads(found[i]) for i in (found if ids is None else ids) if i in found]

    def others(self, run: Run) -> dict[str, int]:
        """How many of a run's answers were made by other versions of the code, by version."""
        with self._open() as base:
            return dict(base.execute("SELECT code, COUNT(*) FROM answers WHERE run = ? AND code != ? GROUP BY code", (run.id, code())))
