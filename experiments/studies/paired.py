"""Pairs of cells: what changes from one to the other on the same pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..metrics import bootstrap
from ..results import Estimate, Sheet
from ..tasks import Task
from .base import Cell, Report, Study, expand, short

DRAWS = 10000


@dataclass
class Paired(Study):
    """Differences within pairs of cells, images drawn in pairs, with p-values that Holm's correction raised for the
    number of pairs, metric by metric. What the task measures by another rule than the published (`Task.beside`) has a
    table of its own, and is not tested.

    pairs: the lines of two cells each; the second minus the first.
    tested: metrics that are tested, all others are shown; None: those that the task has tested.
    matched: cut both answers to one picture to the shorter one's number of words before they are scored.
    """

    pairs: list[list[str]] = field(default_factory=list)
    tested: list[str] | None = None
    matched: bool = False

    def lines(self) -> list[str]:
        return expand([line for pair in self.pairs for line in pair])

    def wanted(self) -> list[str]:
        return self.tested or []

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        found = []
        for base, other in self.pairs:
            found += [
                compare(a, b, self.matched)
                for a, b in zip([cells[k] for k in expand([base])], [cells[k] for k in expand([other])], strict=True)
            ]
        task = next(iter(cells.values())).task
        tested = self.tested or list(task.tested)
        metrics = {m: title for m, title in task.metrics.items() if m in tested or m not in task.beside}
        for metric in tested:
            for row, p in zip(found, bootstrap.holm([row["difference"][metric]["p"] for row in found]), strict=False):
                row["difference"][metric]["holm"] = float(p)
        changes, levels, tests = [], [], []
        for row in found:
            names = {"from": short(row["base"].line), "to": short(row["other"].line), "n": row["n"]} | (
                {"questions": row["questions"]} if row["questions"] > row["n"] else {}
            )
            d = row["difference"]
            changes.append(
                names
                | {
                    title: Estimate.of(d[m], "+", mark="*" * (d[m].get("holm", 1) < 0.05))
                    for m, title in metrics.items()
                }
            )
            for side in ("base", "other"):
                levels.append(
                    {"cell": short(row[side].line), "n": row["n"]}
                    | {title: Estimate.of(row[f"{side} metrics"][m]) for m, title in metrics.items()}
                    | _pace(row[side].rows)
                )
            tests += [names | {"metric": metrics[m], "p": d[m]["p"], "p, Holm": d[m]["holm"]} for m in tested]
        if not self.matched:  # else a cell is cut differently in each pair
            levels = list(
                {
                    line: r
                    for line, r in zip(
                        (row[side].line for row in found for side in ("base", "other")), levels, strict=False
                    )
                }.values()
            )
        note = ", answers cut to the shorter one's words" if self.matched else ""
        star = f"* Holm's p < 0.05 for {', '.join(metrics[m] for m in tested)}, {len(found)} comparisons each"
        sheets = [Sheet(f"Differences{note}; {star}", changes), Sheet(f"Levels{note}", levels), Sheet("Tests", tests)]
        if apart := {m: title for m, title in task.metrics.items() if m not in metrics}:
            sheets.append(Sheet(f"CHAIR in context, not tested{note}", _beside(found, apart)))
        return Report(self.title, sheets, _forest(found, {m: metrics[m] for m in tested}, self.title))


def compare(base: Cell, other: Cell, matched: bool = False) -> dict:
    """Metrics of two cells on the items that both answered, and their difference; `n` counts pictures, `questions`
    items.
    """
    task: Task = base.task
    one, two = ({r["image"]: r for r in task.scored(cell.rows)} for cell in (base, other))
    ids = [i for i in one if i in two]
    pairs = [(one[i], two[i]) for i in ids]
    if matched:
        pairs = [_cut(a, b) for a, b in pairs]
    groups = [a["picture"] for a, _ in pairs]
    a, b = task.counts([p[0] for p in pairs]), task.counts([p[1] for p in pairs])
    return {
        "base": base,
        "other": other,
        "n": len(set(groups)),
        "questions": len(ids),
        "base metrics": bootstrap.summary(a, task.rates, groups),
        "other metrics": bootstrap.summary(b, task.rates, groups),
        "difference": bootstrap.difference(b, a, task.rates, groups, DRAWS),
    }


def _pace(rows: list[dict]) -> dict[str, float]:
    """Milliseconds a token of answers whose times are known: as they were decoded, in batches and beside whatever else
    ran.
    """
    if not all("seconds" in row for row in rows):
        return {}
    return {"ms a token": round(1e3 * sum(row["seconds"] for row in rows) / sum(row["tokens"] for row in rows), 2)}


def _beside(found: list[dict], metrics: dict[str, str]) -> list[dict]:
    """Levels and differences of each pair, a row a metric."""
    return [
        {
            "metric": title,
            "from": short(row["base"].line),
            "to": short(row["other"].line),
            "n": row["n"],
            "level from": Estimate.of(row["base metrics"][m]),
            "level to": Estimate.of(row["other metrics"][m]),
            "difference": Estimate.of(row["difference"][m], "+"),
        }
        for m, title in metrics.items()
        for row in found
    ]


def _cut(a: dict, b: dict) -> tuple[dict, dict]:
    texts = [row["caption"].split() for row in (a, b)]
    n = min(map(len, texts))
    return a | {"caption": " ".join(texts[0][:n])}, b | {"caption": " ".join(texts[1][:n])}


def _forest(found: list[dict], tested: dict[str, str], title: str):
    """Differences with their intervals, a panel a metric."""
    figure, axes = plt.subplots(
        1,
        len(tested),
        figsize=(3.2 * len(tested) + 3, 0.5 * len(found) + 1.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    y = np.arange(len(found))[::-1]
    for axis, (metric, name) in zip(axes[0], tested.items(), strict=False):
        d = [row["difference"][metric] for row in found]
        value, low, high = (np.array([v[k] for v in d]) for k in ("value", "low", "high"))
        sure = np.array([v["holm"] < 0.05 for v in d])
        axis.axvline(0, color="grey", linewidth=0.8)
        for colour, those in (("tab:blue", sure), ("tab:grey", ~sure)):
            axis.errorbar(
                value[those],
                y[those],
                xerr=[(value - low)[those], (high - value)[those]],
                fmt="o",
                color=colour,
                capsize=3,
            )
        axis.set(xlabel=f"{name}\n(difference; blue: Holm p < 0.05)")
    axes[0, 0].set_yticks(y, [f"{short(row['base'].line)}\n→ {short(row['other'].line)}" for row in found], fontsize=7)
    figure.suptitle(title)
    return figure
