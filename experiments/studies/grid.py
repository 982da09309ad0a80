"""Two options of a decoder against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from ..results import Estimate, Sheet
from .base import Cell, Report, Study, expand, short
from .paired import compare


@dataclass
class Grid(Study):
    """Differences from a base cell for all pairs of values of two options, a page a place (a split, a model).

    places: options that make the places, such as `task.split=validation`.
    base: the line that each is compared with.
    line: the cell; `rows` and `columns` name its two options, `values` what they are, in this order.
    shown: metrics of the task in the plot.
    """

    places: list[str] = field(default_factory=list)
    base: str = "decoder=[]"
    line: str = ""
    rows: str = ""
    columns: str = ""
    values: list[list[float]] = field(default_factory=list)
    shown: list[str] = field(default_factory=lambda: ["chair_i_unique", "recall", "f1", "words"])

    def _line(self, place: str, row: float, column: float) -> str:
        return f"{self.line} {self.rows}={row} {self.columns}={column} {place}"

    def lines(self) -> list[str]:
        return expand(
            [f"{self.base} {p}" for p in self.places]
            + [self._line(p, r, c) for p in self.places for r in self.values[0] for c in self.values[1]]
        )

    def wanted(self) -> list[str]:
        return self.shown

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        metrics = next(iter(cells.values())).task.metrics
        rows, columns = self.values
        found = {
            p: [
                [
                    compare(cells[expand([f"{self.base} {p}"])[0]], cells[expand([self._line(p, r, c)])[0]])
                    for c in columns
                ]
                for r in rows
            ]
            for p in self.places
        }
        names = [k.rsplit(".", 1)[-1] for k in (self.rows, self.columns)]
        records = [
            {"place": p, names[0]: r, names[1]: c, "n": cell["n"]}
            | {title: Estimate.of(cell["other metrics"][m]) for m, title in metrics.items()}
            | {f"{title}, minus {self.base}": Estimate.of(cell["difference"][m], "+") for m, title in metrics.items()}
            for p in self.places
            for r, line in zip(rows, found[p], strict=False)
            for c, cell in zip(columns, line, strict=False)
        ]
        figure, axes = plt.subplots(
            len(self.places),
            len(self.shown),
            figsize=(3.4 * len(self.shown), 3.2 * len(self.places)),
            layout="constrained",
            squeeze=False,
        )
        for i, place in enumerate(self.places):
            for axis, metric in zip(axes[i], self.shown, strict=False):
                grid = np.array([[cell["difference"][metric]["value"] for cell in line] for line in found[place]])
                sure = np.array(
                    [
                        [cell["difference"][metric]["low"] * cell["difference"][metric]["high"] > 0 for cell in line]
                        for line in found[place]
                    ]
                )
                most = max(1e-9, np.abs(grid).max())
                axis.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
                for (y, x), v in np.ndenumerate(grid):
                    axis.text(
                        x,
                        y,
                        f"{v:+.1f}" + ("*" if sure[y, x] else ""),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if abs(v) > 0.6 * most else "black",
                    )
                axis.set_xticks(range(len(columns)), columns)
                axis.set_yticks(range(len(rows)), rows)
                axis.set(title=metrics[metric], xlabel=names[1], ylabel=names[0])
            axes[i, 0].set_ylabel(f"{fill(short(place), 30)}\n{names[0]}", fontsize=8)
        figure.suptitle(f"{self.title}: minus {self.base} (* interval excludes 0)")
        return Report(self.title, [Sheet("Every pair of values", records)], figure)
