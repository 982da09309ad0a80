"""Which setting of each decoder is used elsewhere: the best on the validation split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .base import Cell, Estimate, Report, Sheet, Study, expand, short
from .paired import compare


@dataclass
class Tuning(Study):
    """Every setting of every family beside the family's base, and the one with the most of one metric; the first of equals.

    families: by name, `base`, the line of the same search without the decoder, and `lines`, the settings, the published one first.
    best: the metric.
    """

    families: dict[str, dict] = field(default_factory=dict)
    best: str = "f1"

    def lines(self) -> list[str]:
        return expand([line for family in self.families.values() for line in (family["base"], *family["lines"])])

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        metrics = next(iter(cells.values())).task.metrics
        chosen, every, found = [], [], {}
        for name, family in self.families.items():
            base = cells[expand([family["base"]])[0]]
            lines = expand(family["lines"])
            found[name] = [compare(base, cells[line]) for line in lines]
            best = int(np.argmax([row["other metrics"][self.best]["value"] for row in found[name]]))
            for k, (line, row) in enumerate(zip(lines, found[name])):
                words = {"family": name, "setting": short(line), "n": row["n"], "chosen": "yes" if k == best else "", "published": "yes" if k == 0 else ""}
                every.append(
                    words | {t: Estimate.of(row["other metrics"][m]) for m, t in metrics.items()} | {f"{t}, minus the base": Estimate.of(row["difference"][m], "+") for m, t in metrics.items()}
                )
            title = metrics[self.best]
            shown = {f"{title}, chosen": found[name][best]["other metrics"], f"{title}, published": found[name][0]["other metrics"], f"{title}, base": found[name][best]["base metrics"]}
            chosen.append(
                {"family": name, "chosen": short(lines[best]), "published": short(lines[0]), "base": short(family["base"]), "n": found[name][best]["n"]}
                | {k: Estimate.of(v[self.best]) for k, v in shown.items()}
                | {f"{title}, chosen minus base": Estimate.of(found[name][best]["difference"][self.best], "+"), "runs": len(lines)}
            )
        runs, answers = len(cells), sum(len(cell.rows) for cell in cells.values())
        cost = f"cost: {runs} runs, {answers} captions, {sum(r['tokens'] for c in cells.values() for r in c.rows)} tokens"
        sheets = [Sheet(f"Settings with the most {metrics[self.best]}; {cost}", chosen), Sheet("Every setting", every)]
        return Report(self.title, sheets, self._plot(found, cells, metrics[self.best]))

    def _plot(self, found: dict, cells: dict, title: str):
        """The metric of each setting, with its interval; the base as a line, the chosen one blue."""
        total = sum(len(rows) for rows in found.values())
        figure, axes = plt.subplots(len(found), 1, figsize=(8, 0.19 * total + 0.9 * len(found)), layout="constrained", squeeze=False, height_ratios=[len(rows) + 2 for rows in found.values()], sharex=True)
        for axis, (name, rows) in zip(axes[:, 0], found.items()):
            values = [row["other metrics"][self.best] for row in rows]
            best = int(np.argmax([v["value"] for v in values]))
            axis.axvline(rows[0]["base metrics"][self.best]["value"], color="grey", linewidth=0.8)
            for y, v in enumerate(values):
                axis.errorbar(v["value"], -y, xerr=[[v["value"] - v["low"]], [v["high"] - v["value"]]], fmt="o", color="tab:blue" if y == best else "lightgrey", ecolor="tab:blue" if y == best else "lightgrey", capsize=2)
            axis.set_yticks(-np.arange(len(rows)), [short(row["other"].line) for row in rows], fontsize=6)
            axis.set_title(f"{name} (line: without)", fontsize=8)
        axes[-1, 0].set_xlabel(title)
        figure.suptitle(self.title)
        return figure
