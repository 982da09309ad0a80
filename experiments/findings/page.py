"""The page of results: a template in Markdown, whose marks become tables of csv files, and a list of these files.

`{{ name }}` stands for the table `name` of the yaml beside the template, with the plot and the commands of its studies:

- studies: whose answers it shows; the plot is the first one's.
- rows: csv files, without `.csv`; their rows in order. Without it there is the plot alone.
- only: which rows, each a mapping of columns to values; without it all.
- columns: by heading, a column of the rows; or a csv file and a column of its row that has the same `KEYS`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from decoders.errors import choices

from ..inputs.errors import InputError

KEYS = ("from", "to", "cell")
HEAD = "<!-- written by python -m experiments.findings page, from {} -->\n\n"
MARK = re.compile(r"\{\{ (\w+) \}\}")


def page(template: Path, folder: Path) -> str:
    """The text of the page.

    Args:
        template: a Markdown file; a yaml of the same name beside it says what the tables hold.
        folder: the csv files, NAME.png and NAME.json of the studies; links lead into it from beside the template.

    Raises:
        InputError: for a file, a row or a column that is named and not there.
    """
    files, specs = Files(folder), yaml.safe_load(_text(template.with_suffix(".yaml")))

    def filled(mark: re.Match) -> str:
        if mark[1] not in specs:
            raise InputError(choices(mark[1], specs, "table"))
        return _section(specs[mark[1]], files)

    return HEAD.format("results.in.md, results.in.yaml and results/") + MARK.sub(filled, _text(template))


def index(folder: Path) -> str:
    """A page for the folder itself: every study, what it ran on, its files, and what made its answers."""
    parts, read = [], Files(folder)
    for about in sorted(folder.glob("*.json")):
        name, told = about.stem, read.about(about.stem)
        titles = {f"{name}-{number}.csv": title for number, title in enumerate(told["tables"], 1)}
        titles |= {f"{name}.png": told["title"]} | {page: "pictures" for page in told["pages"]}
        files = [wrapped(f"- [{file}]({file}): {_escaped(title)}", "  ") for file, title in titles.items()]
        made = f"Made with {', '.join(told['versions'])} by one or several of these commits: {', '.join(told['code'])}."
        parts.append(
            "\n\n".join([f"## {name}", wrapped(f"{_ran(told)} {told['on']}."), "\n".join(files), wrapped(made)])
        )
    return HEAD.format("the json files here") + "# Tables and plots of the studies\n\n" + "\n\n".join(parts) + "\n"


@dataclass
class Files:
    """The csv and json files of a folder, each read once."""

    folder: Path
    _read: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def _once(self, file: str, parsed: Callable[[str], Any]) -> Any:
        if file not in self._read:
            self._read[file] = parsed(_text(self.folder / file))
        return self._read[file]

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of NAME.csv."""
        return self._once(f"{name}.csv", lambda text: list(csv.DictReader(io.StringIO(text))))

    def about(self, study: str) -> dict:
        """What STUDY.json says of it."""
        return self._once(f"{study}.json", json.loads)

    def like(self, name: str, row: dict[str, str]) -> dict[str, str]:
        """The row of NAME.csv that is of the same cells. Raises InputError unless there is one."""
        found = [other for other in self.rows(name) if all(other.get(k) == row.get(k) for k in KEYS)]
        if len(found) != 1:
            raise InputError(f"{name}.csv has {len(found)} rows of {[row.get(k) for k in KEYS]}")
        return found[0]

    def significant(self, name: str, row: dict[str, str], column: str) -> bool:
        """Whether Holm's p of a difference is below 0.05, by the study's table of tests; False where it has none."""
        study = name.rpartition("-")[0]
        for number in range(1, len(self.about(study)["tables"]) + 1) if "from" in row else ():
            for test in self.rows(f"{study}-{number}"):
                if test.get("metric") == column and all(test.get(k) == row.get(k) for k in KEYS):
                    return float(test["p, Holm"]) < 0.05
        return False


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph of Markdown in lines of at most 120 characters, those after the first indented.

    A line does not begin with what Markdown would read as a list, a heading, a quotation or a tag.
    """
    glued = re.sub(r" (?=(?:[-+*]|#+|\d+[.)]|(?:[>|=<]|~~~|```)\S*)(?: |$))", "\0", text)
    lines = textwrap.fill(glued, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def _text(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"there is no '{file}'")
    return file.read_text()


def _section(spec: dict, files: Files) -> str:
    """A table, its plot and the commands behind it."""
    told = {name: files.about(name) for name in spec["studies"]}
    first = spec["studies"][0]
    links = [f"{_ran(about)} [all tables](results/README.md#{name})." for name, about in told.items()]
    parts = [f"![{told[first]['title']}](results/{first}.png)", "\n".join(wrapped(f"- {link}", "  ") for link in links)]
    return "\n\n".join([_table(spec, files), *parts] if "rows" in spec else parts)


def _table(spec: dict, files: Files) -> str:
    known = [(name, row) for name in spec["rows"] for row in files.rows(name)]
    if "only" in spec:
        known = [one for wanted in spec["only"] for one in _chosen(known, wanted)]
    lines = [[*spec["columns"]], ["---"] * len(spec["columns"])]
    for name, row in known:
        places = [(name, c) if isinstance(c, str) else tuple(c) for c in spec["columns"].values()]
        others = [(file, row if file == name else files.like(file, row), column) for file, column in places]
        lines.append([_value(*one, files) for one in others])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _chosen(known: list[tuple[str, dict]], wanted: dict) -> list[tuple[str, dict]]:
    found = [(name, row) for name, row in known if all(row.get(k) == str(v) for k, v in wanted.items())]
    if not found:
        raise InputError(f"no row of {', '.join(sorted({name for name, _ in known}))} has {wanted}")
    return found


def _value(name: str, row: dict[str, str], column: str, files: Files) -> str:
    """A cell of a table: a number with its interval and, where a difference is significant, a star; or text."""
    if column not in row:
        raise InputError(choices(column, row, f"column of {name}.csv"))
    text = row[column]
    if not re.fullmatch(r"-?\d+\.\d+", text):
        return f"`{text}`" if re.search(r"[][_*|<]", text) else text
    sign = "+" if "from" in row or re.search(r"\bminus\b|\bover\b", column) else ""
    shown = f"{float(text):{sign}.1f}" + "*" * files.significant(name, row, column)
    if row.get(f"{column}, low"):
        low, high = (f"{float(row[f'{column}, {end}']):{sign}.1f}" for end in ("low", "high"))
        shown += f" [{low}, {high}]"
    return shown


def _ran(told: dict) -> str:
    return f"`{told['command']}`, {' and '.join(map(str, told['pictures']))} pictures:"


def _escaped(text: str) -> str:
    return re.sub(r"([*<\[])", r"\\\1", text)
