"""Is a stack off the frontier that trivial means reach?"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TABLEAU_COLORS

from ..metrics import bootstrap
from ..results import Estimate, Sheet
from .base import Cell, Report, Study, expand, short

DRAWS = 2000
ACROSS, UP = "recall", "chair_i_unique"


@dataclass
class Frontier(Study):
    """Recall against CHAIR_I per unique object, for families of cells over their settings, and the frontier of the
    trivial ones.

    Trivial means may be mixed, caption by caption, with each other and with silence. True and false objects of a
    mixture are mixtures of theirs, so the frontier is the lower hull of the trivial points and of nothing said in the
    plane of recall and false objects per object there, which with the recall gives CHAIR_I. A setting is off it if the
    interval of its CHAIR_I minus the frontier's at its recall excludes 0; the frontier is made anew in every draw. It
    is made of the best of many points on the same pictures, which favours the trivial. More recall than any trivial
    point has is compared with the frontier's end, which favours the trivial as well. Intervals are not corrected for
    the number of settings.

    families: lines of each, by name.
    trivial: the names of those that make the frontier.
    """

    families: dict[str, list[str]] = field(default_factory=dict)
    trivial: list[str] = field(default_factory=list)

    def wanted(self) -> list[str]:
        return [ACROSS, UP]

    def lines(self) -> list[str]:
        return expand([line for lines in self.families.values() for line in lines])

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        task = next(iter(cells.values())).task
        scored = {line: {r["image"]: r for r in task.scored(cell.rows)} for line, cell in cells.items()}
        ids = [i for i in next(iter(scored.values())) if all(i in rows for rows in scored.values())]
        picture = [next(iter(scored.values()))[i]["picture"] for i in ids]
        draw = None
        points, drawn = {}, {}
        for line, rows in scored.items():
            table = bootstrap.grouped(task.counts([rows[i] for i in ids]), picture)
            draw = bootstrap.weights(len(table), DRAWS) if draw is None else draw
            points[line] = task.rates(table.sum(0))
            drawn[line] = task.rates(draw @ table)
        base = [line for name in self.trivial for line in expand(self.families[name])]
        hull = np.array([[points[k][ACROSS], points[k][UP]] for k in base])
        hulls = np.stack([np.stack([drawn[k][ACROSS], drawn[k][UP]], -1) for k in base], 1)
        records = []
        for name, lines in self.families.items():
            for line in expand(lines):
                record = {"family": name, "cell": short(line), "n": len(set(picture))}
                record |= {
                    task.metrics[m]: Estimate.of(bootstrap.interval(points[line][m], drawn[line][m]))
                    for m in task.metrics
                    if m not in task.beside
                }
                if name not in self.trivial:
                    gap = points[line][UP] - lower(hull, points[line][ACROSS])
                    gaps = np.array(
                        [u - lower(h, x) for h, x, u in zip(hulls, drawn[line][ACROSS], drawn[line][UP], strict=False)]
                    )
                    record["over the frontier"] = Estimate.of(bootstrap.interval(gap, gaps), "+")
                records.append(record)
        return Report(
            self.title,
            [
                Sheet(
                    "Recall and CHAIR_I of every setting; over the frontier: CHAIR_I minus the trivial frontier's at"
                    " the same recall, intervals each setting's own",
                    records,
                )
            ],
            self._plot(points, hull, task.metrics),
        )

    def _plot(self, points: dict, hull: np.ndarray, titles: dict[str, str]):
        figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
        colours, marks = cycle(c for c in TABLEAU_COLORS if c != "tab:gray"), cycle("x+1234|_*")
        for name, lines in self.families.items():
            xy = np.array([[points[line][ACROSS], points[line][UP]] for line in expand(lines)])
            trivial = name in self.trivial
            style = (
                {"marker": next(marks), "linestyle": ":", "color": "dimgrey", "markersize": 9}
                if trivial
                else {"marker": "o", "linestyle": "none", "color": next(colours)}
            )
            axis.plot(*xy.T, label=name + (" (trivial)" if trivial else ""), **style)
        x = np.linspace(hull[:, 0].min(), hull[:, 0].max(), 200)
        axis.plot(x, [lower(hull, v) for v in x], color="black", linewidth=1, label="trivial frontier")
        axis.set(xlabel=titles[ACROSS], ylabel=titles[UP], title=self.title)
        axis.legend(fontsize=7, frameon=False)
        return figure


def lower(points: np.ndarray, x: float) -> float:
    """The least CHAIR_I that mixtures of points, and silence, reach at a recall of `x` or more; beyond them all, that
    of the last.

    Args:
        points: recall and CHAIR_I in per cent, [n, 2].
    """
    false = points[:, 0] * points[:, 1] / np.maximum(100 - points[:, 1], 1e-9)  # in per cent of the objects there
    plane = np.concatenate([np.stack([points[:, 0], false], 1), [[0, 0]]])
    order = plane[
        np.lexsort((plane[:, 1], -plane[:, 0]))
    ]  # from the right; only those lower than all further right count
    kept: list[np.ndarray] = []
    for p in order:
        if kept and p[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and _above(kept[-2], kept[-1], p):
            kept.pop()
        kept.append(p)
    line = np.array(kept[::-1])
    at = np.clip(x, 1e-9, line[-1, 0])
    least = np.interp(at, line[:, 0], line[:, 1])
    return float(100 * least / max(least + at, 1e-9))


def _above(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bool:
    """Whether b lies on or above the straight line from a to c, with a the furthest right."""
    return b[1] >= a[1] + (c[1] - a[1]) * (b[0] - a[0]) / (c[0] - a[0])
