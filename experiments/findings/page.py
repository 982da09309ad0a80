"""The page of results: a template in Markdown, whose marks become tables of csv files.

`{{ name }}` stands for the table `name` of the yaml beside the template, with the plot and the commands of its studies:

- studies: whose answers it shows; the plot is the first one's.
- rows: csv files, without `.csv`; their rows in order.
- only: which rows, each a mapping of columns to values; without it all.
- columns: by heading, a column of the rows; or a csv file and a column of its row that has the same `KEYS`.
- digits: after the point; by default 1.

`{{ studies }}` stands for the list of all studies, with what each was run on and its csv files.
"""

from __future__ import annotations

import csv
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml

from decoders.errors import choices

from ..inputs.errors import InputError

KEYS = ("from", "to", "cell")
HEAD = "<!-- written by python -m experiments.findings page, from results.in.md, results.in.yaml and results/ -->\n\n"
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
        if mark[1] == "studies":
            return _studies(files)
        if mark[1] not in specs:
            raise InputError(choices(mark[1], specs, "table"))
        return _section(specs[mark[1]], files)

    return HEAD + MARK.sub(filled, _text(template))


@dataclass(frozen=True)
class Files:
    """The csv and json files of a folder."""

    folder: Path

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of NAME.csv."""
        return list(csv.DictReader(_text(self.folder / f"{name}.csv").splitlines()))

    def about(self, study: str) -> dict:
        """What STUDY.json says of it."""
        return json.loads(_text(self.folder / f"{study}.json"))

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


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def _section(spec: dict, files: Files) -> str:
    """A table, its plot and the commands behind it."""
    known = [(name, row) for name in spec["rows"] for row in files.rows(name)]
    if "only" in spec:
        known = [one for wanted in spec["only"] for one in _chosen(known, wanted)]
    lines = []
    for name, row in known:
        places = [(name, c) if isinstance(c, str) else tuple(c) for c in spec["columns"].values()]
        others = [(file, row if file == name else files.like(file, row), column) for file, column in places]
        lines.append([_value(*one, spec.get("digits", 1), files) for one in others])
    table = _markdown(list(spec["columns"]), lines)
    first = spec["studies"][0]
    plot = f"![{files.about(first)['title']}](results/{first}.png)"
    return "\n\n".join([table, plot, wrapped("; ".join(_command(name, files) for name in spec["studies"]) + ".")])


def _chosen(known: list[tuple[str, dict]], wanted: dict) -> list[tuple[str, dict]]:
    found = [(name, row) for name, row in known if all(row.get(k) == str(v) for k, v in wanted.items())]
    if not found:
        raise InputError(f"no row of {', '.join(sorted({name for name, _ in known}))} has {wanted}")
    return found


def _value(name: str, row: dict[str, str], column: str, digits: int, files: Files) -> str:
    """A cell of a table: a number with its interval and, where a difference was tested, a star; or text."""
    if column not in row:
        raise InputError(choices(column, row, f"{name}.csv: column"))
    text = row[column]
    if not re.fullmatch(r"-?\d+\.\d+", text):
        return f"`{text}`" if re.search(r"[][_*|<]", text) else text
    sign = "+" if "from" in row or re.search(r"\bminus\b|\bover\b", column) else ""
    ends = [f"{float(text):{sign}.{digits}f}" + "*" * files.significant(name, row, column)]
    if row.get(f"{column}, low"):
        low, high = (f"{float(row[f'{column}, {end}']):{sign}.{digits}f}" for end in ("low", "high"))
        ends.append(f"[{low}, {high}]")
    return " ".join(ends)


def _command(study: str, files: Files) -> str:
    about = files.about(study)
    return f"`{about['command']}` ({' and '.join(map(str, about['pictures']))} pictures)"


def _studies(files: Files) -> str:
    """Every study: its command, what it was run on, and its files."""
    names = sorted(file.stem for file in files.folder.glob("*.json"))
    rows = []
    for name in names:
        about = files.about(name)
        titles = [re.split("[;:,]", title)[0].lower() for title in about["tables"]]
        links = [f"[{title}](results/{name}-{number}.csv)" for number, title in enumerate(titles, 1)]
        links += [f"[{other}](results/{other})" for other in about["pages"]]
        pictures = " and ".join(map(str, about["pictures"]))
        rows.append([f"`{name}`", about["on"], pictures, ", ".join(links), ", ".join(about["code"])])
    versions = dict.fromkeys(version for name in names for version in files.about(name)["versions"])
    table = _markdown(["study", "ran on", "pictures", "tables", "code"], rows)
    return table + "\n\n" + wrapped(f"With {', '.join(versions)}.")
