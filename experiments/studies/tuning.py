"""Which setting of each decoder is used elsewhere: the best on the validation split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..results import Estimate, Sheet
from .base import Cell, Report, Study, expand, short
from .paired import compare


@dataclass
class Tuning(Study):
    """Every setting of every family beside the family's base, and the one chosen: the least of one metric among those
    that lose little of another.

    families: by name, `base`, the line of the same search without the decoder, and `lines`, the settings, the published
    one first.
    least: the metric to be small; the first of equals.
    kept: the metric of which a setting may lose `margin` points against the base; where all lose more, the one that
    loses least is chosen.
    """

    families: dict[str, dict] = field(default_factory=dict)
    least: str = "chair_i_unique"
    kept: str = "recall"
    margin: float = 3.0

    def lines(self) -> list[str]:
        return expand([line for family in self.families.values() for line in (family["base"], *family["lines"])])

    def wanted(self) -> list[str]:
        return [self.least, self.kept]

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        metrics = next(iter(cells.values())).task.metrics
        chosen, every, found = [], [], {}
        for name, family in self.families.items():
            base = cells[expand([family["base"]])[0]]
            lines = expand(family["lines"])
            found[name] = [compare(base, cells[line]) for line in lines]
            best = self._best(found[name])
            for k, (line, row) in enumerate(zip(lines, found[name], strict=False)):
                words = {
                    "family": name,
                    "setting": short(line),
                    "n": row["n"],
                    "chosen": "yes" if k == best else "",
                    "published": "yes" if k == 0 else "",
                }
                every.append(
                    words
                    | {t: Estimate.of(row["other metrics"][m]) for m, t in metrics.items()}
                    | {f"{t}, minus the base": Estimate.of(row["difference"][m], "+") for m, t in metrics.items()}
                )
            first, taken = found[name][0], found[name][best]
            record = {
                "family": name,
                "chosen": short(lines[best]),
                "published": short(lines[0]),
                "base": short(family["base"]),
                "n": taken["n"],
            }
            for m in (self.least, self.kept):
                shown = {
                    "base": taken["base metrics"],
                    "published": first["other metrics"],
                    "chosen": taken["other metrics"],
                }
                record |= {f"{metrics[m]}, {k}": Estimate.of(v[m]) for k, v in shown.items()} | {
                    f"{metrics[m]}, chosen minus base (on the pictures that chose it)": Estimate.of(
                        taken["difference"][m], "+"
                    )
                }
            chosen.append(record | {"runs": len(lines)})
        runs, answers = len(cells), sum(len(cell.rows) for cell in cells.values())
        cost = (
            f"cost: {runs} runs, {answers} captions, {sum(r['tokens'] for c in cells.values() for r in c.rows)} tokens"
        )
        rule = (
            f"the least {metrics[self.least]} among settings that lose at most {self.margin:g} points of"
            f" {metrics[self.kept]}"
        )
        return Report(
            self.title,
            [Sheet(f"Chosen: {rule}; {cost}", chosen), Sheet("Every setting", every)],
            self._plot(found, metrics),
        )

    def _best(self, rows: list[dict]) -> int:
        """The place of the setting that is chosen."""
        lost = [-row["difference"][self.kept]["value"] for row in rows]
        if min(lost) > self.margin:
            return int(np.argmin(lost))
        return min(
            (row["other metrics"][self.least]["value"], k) for k, row in enumerate(rows) if lost[k] <= self.margin
        )[1]

    def _plot(self, found: dict[str, list[dict]], metrics: dict[str, str]):
        """Both metrics of each setting, with intervals; the base as a line, the chosen setting blue."""
        total = sum(len(rows) for rows in found.values())
        heights = [len(rows) + 2 for rows in found.values()]
        figure, axes = plt.subplots(
            len(found),
            2,
            figsize=(10, 0.2 * total + 0.8 * len(found)),
            layout="constrained",
            squeeze=False,
            height_ratios=heights,
            sharex="col",
            sharey="row",
        )
        for pair, (name, rows) in zip(axes, found.items(), strict=False):
            best = self._best(rows)
            for axis, m in zip(pair, (self.least, self.kept), strict=False):
                axis.axvline(rows[0]["base metrics"][m]["value"], color="grey", linewidth=0.8)
                for y, v in enumerate(row["other metrics"][m] for row in rows):
                    axis.errorbar(
                        v["value"],
                        -y,
                        xerr=[[v["value"] - v["low"]], [v["high"] - v["value"]]],
                        fmt="o",
                        markersize=4,
                        color="tab:blue" if y == best else "silver",
                        capsize=2,
                    )
                axis.set_title(f"{name} (line: without)", fontsize=8)
            pair[0].set_yticks(-np.arange(len(rows)), [short(row["other"].line) for row in rows], fontsize=6)
        for axis, m in zip(axes[-1], (self.least, self.kept), strict=False):
            axis.set_xlabel(metrics[m])
        figure.suptitle(self.title)
        return figure
