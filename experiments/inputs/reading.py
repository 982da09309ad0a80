"""What all readers of published benchmarks need: files that may be missing or broken, and a part of what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .errors import InputError

_SHOWN = 3  # missing files that an error names


def find(path: str, what: str, published: str) -> Path:
    """The file or folder at `path`. Raises InputError where there is none, with the place where it is published."""
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(
            f"{what} is missing: no '{path}'. It is published at {published}; put it there, or say where it lies"
        )
    return place


def load(path: str, what: str, published: str, kind: type):
    """The JSON of a file, whose outermost value must be a `kind`, list or dict. Raises InputError."""
    place = find(path, what, published)
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} '{path}' cannot be read as JSON: {error}; fetch it again from {published}") from error
    if not isinstance(found, kind):
        raise InputError(
            f"{what} '{path}' should hold a JSON {kind.__name__}, it holds a {type(found).__name__}; the right file is"
            f" published at {published}"
        )
    return found


def lines(file: Path, what: str) -> Iterator[tuple[int, str, object]]:
    """The values of a file of JSON lines, those that are blank left out: the number of each line, counted from 1, its
    place in words, and its value.

    Raises InputError for a file that cannot be read, and for a line that is no JSON.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} '{file}' cannot be read: {error}; it holds a JSON object a line") from error
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at breaks inside a text
        if line.strip():
            where = f"'{file}', line {number},"
            yield number, where, parse(line, where)


def parse(line: str, where: str) -> object:
    """The value of a JSON line. Raises InputError with its place."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON: {error}") from error


def fields(row: object, names: Iterable[str], where: str) -> dict:
    """The row, once it is sure to have these fields. Raises InputError with the place of a row that has not."""
    if not isinstance(row, dict):
        raise InputError(f"{where} should be a JSON object, it is a {type(row).__name__}")
    lacking = [name for name in names if name not in row]
    if lacking:
        raise InputError(f"{where} lacks {', '.join(lacking)}; it has {', '.join(row) or 'nothing'}")
    return row


def pictures(folder: str, names: Iterable[str], what: str, published: str) -> dict[str, Path]:
    """The file of each named picture in a folder. Raises InputError that names the first of those that are missing, and
    how many are.
    """
    place = find(folder, f"the folder of {what}", published)
    if not place.is_dir():
        raise InputError(f"'{folder}' should be the folder of {what}, it is a file; they are published at {published}")
    files = {name: place / name for name in names}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputError(
            f"{len(missing)} of {len(files)} pictures are missing in '{folder}': {', '.join(missing[:_SHOWN])}{more};"
            f" {what} are published at {published}"
        )
    return files


def part(rows: Sequence, start: int, count: int | None, what: str) -> list:
    """`count` rows from the `start`-th on, or all of them. Raises InputError where none or not so many are left."""
    if start < 0 or (count is not None and count < 1):
        raise InputError(f"{what} are counted from 0, and at least one is needed, not {count} from {start} on")
    found = list(rows[start:] if count is None else rows[start : start + count])
    if not found or (count is not None and len(found) < count):
        raise InputError(
            f"there are {len(rows)} {what}; {'some' if count is None else count} from the {start}th on were asked for"
        )
    return found


def write(file: Path, value: object) -> Path:
    """Write a value as JSON, and make its folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return file


def write_lines(file: Path, rows: Iterable[dict]) -> Path:
    """Write rows as JSON lines, and make their folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
