"""`run.py` in processes of its own, and what its store and its folders hold, for the tests of sweeps."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["compare=false", "task.count=4", "batch_size=2", "max_new_tokens=20"]


def start(*words, env: dict[str, str] | None = None, **more) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        [sys.executable, "run.py", *map(str, words)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def run(*words, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """A command's exit code, output and errors."""
    process = start(*words, env=env)
    out, errors = process.communicate(timeout=600)
    return process.returncode, out, errors


def sweep(folder: Path, *words: str) -> list[str]:
    return ["-m", *words, f"hydra.sweep.dir={folder}", f"results={folder.parent}/results.sqlite"]


def kept(store: Path) -> list[tuple]:
    """Every answer of a store, with its place in the file."""
    if not store.exists():
        return []
    with closing(sqlite3.connect(store, timeout=60)) as base:
        known = base.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone()
        return base.execute("SELECT rowid, run, item, row FROM answers ORDER BY rowid").fetchall() if known else []


def plain(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "seconds"}


def said(folder: Path) -> list[dict]:
    return [plain(json.loads(line)) for line in (folder / "captions.jsonl").read_text().splitlines()]
