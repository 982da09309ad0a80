"""Write what the studies show: `python -m experiments.findings` makes `docs/findings.md` and its plots from the stored
results.

Nothing is generated for it but the few answers whose pruned patches are drawn. Models in folders must be where they
were when the studies ran, since runs are known by the digests of their files.

What the text around the tables says stands in `docs/findings.in.md`; `{{ study }}` there stands for that study's tables
and plot.
"""

from __future__ import annotations

import argparse
import html
import re
import textwrap
from pathlib import Path

import hydra
from hydra.utils import instantiate
from rich.console import Console
from rich.text import Text

from .inputs import conf_files
from .inputs.errors import InputError
from .models import ROOT
from .results import DEFAULT, Results, Run, Sheet
from .studies import Report
from .studies.cells import reported, study_cells

DOCS = ROOT / "docs"


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph of Markdown in lines of at most 120 characters, those after the first indented.

    A line does not begin with what Markdown would read as a list, a heading, a quotation or a tag.
    """
    glued = re.sub(r" (?=(?:[-+*]|#+|\d+[.)]|(?:[>|=<]|~~~|```)\S*)(?: |$))", "\0", text)
    lines = textwrap.fill(glued, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def markdown(sheet: Sheet) -> str:
    """A table; numbers that stand alone have three figures, and what models say is shown as it is."""
    columns = list(dict.fromkeys(k for record in sheet.records for k in record))

    def cell(value: object) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split()).replace("&", "&amp;")
        return re.sub(r"([\\|`*_\[\]<>])", r"\\\1", text) if isinstance(value, str) else text

    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(r.get(c, "")) for c in columns) + " |" for r in sheet.records),
    ]
    return wrapped(f"**{sheet.title}**") + "\n\n" + "\n".join(lines)


def section(report: Report, name: str, command: str, most: int = 40) -> str:
    """A study's tables, cut to what fits a page, those after the first folded away, and its plot."""
    parts = []
    for number, sheet in enumerate(report.sheets, 1):
        cut = Sheet(sheet.title, sheet.records[:most])
        more = (
            f"\n\nand {len(sheet.records) - most} more rows in [{name}-{number}.csv](findings/{name}-{number}.csv)"
            if len(sheet.records) > most
            else ""
        )
        table = markdown(cut) + more
        summary = wrapped(f"<details><summary>{html.escape(sheet.title)}</summary>")
        parts.append(table if number == 1 else f"{summary}\n\n{table}\n\n</details>")
    if report.figure is not None:
        parts.append(f"![{report.title}](findings/{name}.png)")
    parts += [f"[{page.name}](findings/{page.name})" for page in report.pages]
    return "\n\n".join([wrapped(f"`{command}`: {report.on}"), *parts])


def write(
    store: Results, console: Console, template: Path = DOCS / "findings.in.md", out: Path = DOCS / "findings.md"
) -> None:
    """Raises InputError, with the commands to run, if a study's cells are not all in the store."""
    if not template.is_file():
        raise InputError(f"there is no '{template}': findings are written in a checkout of the repository")
    text, missing = template.read_text(), []
    reports = {}
    with hydra.initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        names = re.findall(r"\{\{ (\w+) \}\}", text)
        studies = {name: instantiate(hydra.compose("run", [f"experiment={name}"]).experiment) for name in names}
        for name, study in studies.items():
            cells = study_cells(study, [], store, console)
            if lacking := sum(cell.lacking(store) for cell in cells.values()):
                missing.append(f"python run.py experiment={name}  # {lacking} answers")
            else:
                reports[name] = cells
        if missing:
            raise InputError(f"the store '{store.file}' lacks answers; first run\n  " + "\n  ".join(missing))
        for name, cells in reports.items():
            console.print(Text(name))
            report = reported(studies[name], cells, store, console, out.parent / "findings")
            text = text.replace(f"{{{{ {name} }}}}", section(report, name, f"python run.py experiment={name}"))
    runs = {cell.run.id: cell.run for cells in reports.values() for cell in cells.values()}
    out.write_text(
        "<!-- written by python -m experiments.findings from findings.in.md and the stored results -->\n\n"
        + text
        + _made_by(store, runs)
    )
    console.print(Text(f"written: {out}"))


def _made_by(store: Results, runs: dict[str, Run]) -> str:
    """What made the answers."""
    answers, packages = (
        store.codes(runs),
        sorted({f"{k} {v}" for run in runs.values() for k, v in run.versions.items()}),
    )
    lines = [
        f"{sum(answers.values())} answers in {len(runs)} runs",
        f"made by this code at {', '.join(f'{k} ({n})' for k, n in answers.items())}",
        f"with {', '.join(packages)}",
    ]
    return "\n## What made them\n\n" + wrapped(", ".join(lines) + ".") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=DEFAULT, help="the store")
    args = parser.parse_args()
    console = Console(stderr=True)
    try:
        write(Results(args.results), console)
    except InputError as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
