"""How often something is pruned, when, and after how many words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from ..metrics import bootstrap
from ..results import Estimate, Sheet
from .base import Cell, Report, Study, expand, short


@dataclass
class Trigger(Study):
    """The number of prunes, the step of each, and both by length of the answer, for every cell.

    cells: their lines.
    lengths: where the classes of length begin, in tokens.
    """

    cells: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [0, 25, 50, 75, 100])

    def lines(self) -> list[str]:
        return expand(self.cells)

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        counts, classes = [], []
        most = max((len(r["prunes"]) for cell in cells.values() for r in cell.rows), default=0)
        figure, axes = plt.subplots(
            len(cells), 2, figsize=(11, 1.9 * len(cells) + 0.6), layout="constrained", squeeze=False
        )
        for (line, cell), (left, right) in zip(cells.items(), axes, strict=False):
            rows = cell.rows
            number = np.array([len(r["prunes"]) for r in rows])
            record = {
                "cell": short(line),
                "n": len(rows),
                "prunes": _mean(number),
                "tokens": _mean(np.array([r["tokens"] for r in rows])),
            }
            record |= {
                f"{k} prunes, %": Estimate.of(bootstrap.share(number == k, np.ones(len(rows)))) for k in range(most + 1)
            }
            for k in range(most):
                at = np.array([r["prunes"][k]["step"] for r in rows if len(r["prunes"]) > k])
                record[f"step of prune {k + 1}: 10th / 50th / 90th percentile"] = (
                    " / ".join(f"{v:.0f}" for v in np.percentile(at, [10, 50, 90])) if len(at) else ""
                )
                if len(at):
                    left.hist(
                        at, bins=np.arange(0.5, max(r["tokens"] for r in rows) + 1.5), alpha=0.6, label=f"prune {k + 1}"
                    )
            counts.append(record)
            for low, high in zip(self.lengths, [*self.lengths[1:], None], strict=False):
                those = [r for r in rows if low <= r["tokens"] < (high or np.inf)]
                if those:
                    made = np.array([len(r["prunes"]) for r in those])
                    last = np.array([max(p["step"] for p in r["prunes"]) / r["tokens"] for r in those if r["prunes"]])
                    record = {
                        "cell": short(line),
                        "tokens": f"{low} or more" if high is None else f"{low} to {high - 1}",
                        "n": len(those),
                        "prunes": _mean(made),
                        "with a prune": len(last),
                    }
                    classes.append(
                        record | {"last prune, as a share of the answer": _mean(last, 2) if len(last) else ""}
                    )
            left.set(xlabel="step m", ylabel="answers", title=line)
            left.title.set_fontsize(8)
            if number.any():
                left.legend(frameon=False, fontsize=7)
            right.scatter(
                [r["tokens"] for r in rows],
                number + np.random.default_rng(0).uniform(-0.2, 0.2, len(rows)),
                s=4,
                alpha=0.4,
            )
            right.set(xlabel="tokens of the answer", ylabel="prunes (spread out)", ylim=(-0.5, number.max() + 0.5))
            right.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(self.title)
        return Report(
            self.title, [Sheet("How many prunes, and when", counts), Sheet("By length of the answer", classes)], figure
        )


def _mean(values: np.ndarray, digits: int = 1) -> Estimate:
    draws = bootstrap.weights(len(values)) @ values / len(values)
    return Estimate.of(bootstrap.interval(values.mean(), draws), digits=digits)
