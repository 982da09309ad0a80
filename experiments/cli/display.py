"""What a person sees: captions with their errors marked, a table, and a picture of attention and prunes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..metrics.words import stuck_on
from ..results import Estimate, Sheet, metric_rows

STUCK = 5  # times that a word stands in a row in an answer that is warned of


class _Lines(logging.Handler):
    """Prints what is logged."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(Text(record.getMessage(), "yellow" if record.levelno >= logging.WARNING else "dim"))


@contextmanager
def loop_messages(console: Console) -> Iterator[None]:
    """Within, what the loop has to say, such as that it compiles, stands on the console."""
    logger = logging.getLogger("decoders")
    handler, level, propagate = _Lines(console), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def caption(row: dict) -> Text:
    """A caption; hallucinated words red, truthful objects green. What a model says is never markup."""
    text = Text(row["caption"])
    for m in row["mentions"]:
        if row["hallucinated"] is not None:
            style = "bold red" if m["object"] in row["hallucinated"] else "green"
        else:
            style = "cyan"
        text.stylize(style, m["start"], m["end"])
    return text


def _marked(row: dict) -> Text:
    """A caption for a screen without colours: hallucinated words in brackets."""
    text = row["caption"]
    for m in sorted(row["mentions"], key=lambda m: m["start"], reverse=True):
        if m["object"] in (row["hallucinated"] or ()):
            text = f"{text[: m['start']]}[{text[m['start'] : m['end']]}]{text[m['end'] :]}"
    return Text(text)


def captions(console: Console, found: dict[str, list[dict]], count: int) -> None:
    """The first `count` answers, all stacks below one another."""
    by = {label: {row["image"]: row for row in rows} for label, rows in found.items()}
    coloured = console.color_system is not None and not console.no_color
    images = list(dict.fromkeys(row["image"] for rows in found.values() for row in rows))[:count]
    shown = [rows[image] for image in images for rows in by.values() if image in rows]
    if not coloured and any(row["hallucinated"] is not None for row in shown):
        console.print(Text("[word]: an object that is not in the picture"))
    for image in images:
        for k, label in enumerate(by):
            if row := by[label].get(image):
                there = (
                    f" (in the picture: {', '.join(row['objects'])})" if row["objects"] is not None and not k else ""
                )
                console.print(Text.assemble((f"{image} {label}", "bold"), (there, "dim")))
                if row["question"]:
                    console.print(Text(row["question"], "italic"))
                console.print(caption(row) if coloured else _marked(row), "")


def repeated(console: Console, found: dict[str, list[dict]]) -> None:
    """A line of warning where answers of some stack got stuck on one word, with an example."""
    parts, example = [], ""
    for label, rows in found.items():
        stuck = [(row["image"], word) for row in rows if (word := stuck_on(row["caption"], STUCK)) is not None]
        if stuck:
            parts.append(f"{len(stuck)} of {len(rows)} answers of {label}")
            example = example or "{}: '{}'".format(*stuck[0])
    if parts:
        console.print(Text(f"{', '.join(parts)} repeat one word {STUCK} times in a row or more ({example})", "yellow"))


def table(console: Console, metrics: dict[str, dict], titles: dict[str, str], title: str) -> None:
    """Each metric with its 95 % interval, by stack, and the paired difference from the first."""
    first = next(iter(metrics.values()))
    n = first.get("n", 0)
    pictures = first.get("pictures", n)
    asked = f"n = {n}" if pictures == n else f"n = {n} questions on {pictures} pictures"
    out = Table(
        title=Text(
            f"{title}, {asked}; 95 % intervals, bootstrap over pictures"
            if n
            else f"{title}: nobody knows what is in these pictures, so nothing is scored"
        )
    )
    head, rows = metric_rows(metrics, titles)
    for k, name in enumerate(head):
        out.add_column(Text(name), justify="right" if k else "left")
    for row in rows:
        out.add_row(*map(Text, row))
    console.print(out)


def sheet(console: Console, found: Sheet, most: int = 60) -> None:
    """A study's table; of many records the first. On a narrow screen without intervals, then a column a record, then
    without the last columns, so that no number breaks.
    """
    columns = list(dict.fromkeys(k for record in found.records for k in record))
    wide = sum(
        max(12 if " " in name else len(name), *(len(str(r.get(name, ""))) for r in found.records)) + 3
        for name in columns
    )
    narrow = wide > console.width

    def cell(value: object) -> str:
        if isinstance(value, Estimate) and narrow:
            return value.point
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = [columns, *([cell(record.get(name, "")) for name in columns] for record in found.records[:most])]
    texts = [isinstance(found.records[0].get(name), str) for name in columns]
    across = list(zip(*rows, strict=False))
    style, between, hidden = {}, 3, 0
    tight = narrow and _least(across, texts) > console.width
    if tight:
        if _least(rows, turned := [True] + [False] * (len(rows) - 1)) <= console.width:
            across, texts = rows, turned
        else:
            style, between = {"box": SIMPLE_HEAD, "padding": 0, "pad_edge": False}, 1
            while len(across) > 2 and _least(across, texts, between) > console.width:
                across, hidden = across[:-1], hidden + 1
    notes = ["intervals"] * narrow + [f"{hidden} more column{'s' * (hidden > 1)}"] * (hidden > 0)
    out = Table(title=Text(found.title + (f"; {' and '.join(notes)} are in the csv" if notes else "")), **style)
    spare = (console.width - _least(across, texts, between)) // max(1, sum(texts))
    for column, text in zip(across, texts, strict=False):
        out.add_column(
            Text(column[0]),
            justify="left" if text else "right",
            overflow="fold",
            width=_width(column, text) + spare * text if tight else None,
        )
    for row in list(zip(*across, strict=False))[1:]:
        out.add_row(*map(Text, row))
    console.print(out)
    if len(found.records) > most:
        console.print(f"and {len(found.records) - most} more, in the csv", style="dim")


def _width(column: Sequence[str], text: bool) -> int:
    """Where a column's numbers do not break, and its words seldom."""
    longest = max(len(word) for cell in column for word in cell.split() or [""])
    return min(longest, 9) if text else longest


def _least(columns: Sequence[Sequence[str]], texts: Sequence[bool], between: int = 3) -> int:
    """The width of a table with so much between columns."""
    return sum(_width(column, text) + between for column, text in zip(columns, texts, strict=False)) + 1


def picture(rows: list[dict], file: Path) -> None:
    """Mean attention per visual token by step, its 10-90 % band over captions, and how many captions prune at each
    step.
    """
    rows = [r for r in rows if r.get("attention")]
    if not rows:
        return
    steps = max(len(r["attention"]) for r in rows)
    grid = np.full((len(rows), steps), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row["attention"])] = row["attention"]
    enough = (~np.isnan(grid)).sum(0) >= max(1, len(rows) // 10)
    x = np.arange(1, steps + 1)[enough]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[3, 1], layout="constrained")
    top.plot(x, 100 * np.nanmean(grid[:, enough], 0), color="tab:blue", label="mean over captions and layers")
    top.fill_between(
        x,
        *(100 * np.nanpercentile(grid[:, enough], q, 0) for q in (10, 90)),
        alpha=0.2,
        color="tab:blue",
        label="10 to 90 % of captions",
    )
    top.set_ylabel("attention per visual token left, %")
    top.set_ylim(bottom=0)
    top.set_xlim(0, x.max() + 1)
    top.legend(frameon=False)
    most = max((len(r["prunes"]) for r in rows), default=0)
    for k in range(most):
        at = [r["prunes"][k]["step"] for r in rows if len(r["prunes"]) > k]
        bottom.hist(at, bins=np.arange(0.5, steps + 1.5), alpha=0.7, label=f"prune {k + 1}")
    bottom.set(xlabel="step m (1 is the prefill)", ylabel="captions")
    if most:
        bottom.legend(frameon=False)
    top.set_title(f"Attention to visual tokens by step, and prunes ({len(rows)} captions, {rows[0]['stack']})")
    figure.savefig(file, dpi=120)
    plt.close(figure)
