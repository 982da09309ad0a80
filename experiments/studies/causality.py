"""Does less attention to the picture go with hallucination once the place in the caption is held fixed?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.interpolate import BSpline

from ..metrics import bootstrap
from ..results import Estimate, Sheet
from .base import Cell, Report, Study, expand
from .paired import Paired

FEWEST = 10  # hallucinated objects, and others, for a regression


@dataclass
class Causality(Study):
    """Three looks at one question, from captions whose attention was noted (`decoder=[watch]`).

    Objects: logistic regressions of an object's being hallucinated, at its first mention, on the attention to the
    picture of the forward that made its first token (mean over layers and heads, sum over visual tokens), on a cubic
    spline of the step, since attention falls with the step along a curve and so does what is true, and on how frequent
    the object is in other pictures; generalised estimating equations with captions as clusters (Liang and Zeger 1986,
    https://doi.org/10.1093/biomet/73.1.13). An odds ratio is that of one standard deviation more.
    Captions: attention at each step in captions with a hallucination and in captions without.
    Interventions: pairs of cells, as in `Paired`.

    watched: the cell whose attention was noted.
    """

    watched: str = "decoder=[watch]"
    pairs: list[list[str]] = field(default_factory=list)

    def _paired(self) -> Paired:
        return Paired(self.name, self.title, self.settings, self.pairs)

    def lines(self) -> list[str]:
        return expand([self.watched, *self._paired().lines()])

    def wanted(self) -> list[str]:
        return ["chair_i"]

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        rows = cells[expand([self.watched])[0]].rows
        said = objects(rows)
        sheets = [Sheet("Odds of a hallucination for one standard deviation more", regressions(said))]
        steps, curves = by_step(rows)
        sheets.append(
            Sheet(
                "Attention to the picture in captions with and without a hallucination, %; intervals are each"
                " step's own",
                curves,
            )
        )
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        for kind, colour in (("without", "tab:green"), ("with", "tab:red")):
            v = [steps[kind][record["step"]] for record in curves]
            x = [record["step"] for record in curves]
            axis.plot(x, [e.value for e in v], color=colour, label=f"captions {kind} a hallucination")
            axis.fill_between(x, [e.low for e in v], [e.high for e in v], color=colour, alpha=0.2)
        axis.set(xlabel="step m", ylabel="attention to the picture, %", title=self.title, ylim=(0, None))
        axis.legend(frameon=False)
        if self.pairs:
            sheets += (
                self._paired().report({k: c for k, c in cells.items() if k != expand([self.watched])[0]}, folder).sheets
            )
        return Report(self.title, sheets, figure)


def objects(rows: list[dict]) -> dict[str, np.ndarray]:
    """First mentions: `caption` (its number), `false`, `attention` in per cent, `step`, `frequency` (log of one more
    than the number of other pictures with the object).
    """
    known = Counter(name for row in rows for name in row["objects"])
    out = []
    for i, row in enumerate(rows):
        told: set[str] = set()
        for m in row["mentions"]:
            if m["object"] not in told and m["token"] < len(row["attention_by_layer"]):
                told.add(m["object"])
                level = 100 * np.mean(row["attention_by_layer"][m["token"]])
                out.append(
                    (
                        i,
                        m["object"] not in row["objects"],
                        level,
                        m["token"] + 1,
                        np.log1p(known[m["object"]] - (m["object"] in row["objects"])),
                    )
                )
    table = np.array(out, float).reshape(-1, 5)
    return dict(zip(("caption", "false", "attention", "step", "frequency"), table.T, strict=False))


def regressions(said: dict[str, np.ndarray]) -> list[dict]:
    """Attention alone, with the step, and with the step and the frequency; a record a model and term, p-values not
    corrected.
    """
    import statsmodels.api as sm  # takes seconds to import

    z = {k: (v - v.mean()) / max(v.std(), 1e-12) for k, v in said.items() if k not in ("caption", "false")}
    if min(said["false"].sum(), (1 - said["false"]).sum()) < FEWEST:
        return [
            {
                "model": f"none: fewer than {FEWEST} objects of a kind, hallucinated or not",
                "objects": len(said["false"]),
                "hallucinated": int(said["false"].sum()),
            }
        ]
    out = []
    for terms, step in ((("attention",), False), (("attention",), True), (("attention", "frequency"), True)):
        base = spline(said["step"]) if step else np.ones((len(z["step"]), 1))
        x = np.concatenate([np.stack([z[t] for t in terms], 1), base], 1)
        if any(said[t].std() == 0 for t in terms):
            continue  # what is the same everywhere explains nothing
        fit = sm.GEE(
            said["false"],
            x,
            groups=said["caption"],
            family=sm.families.Binomial(),
            cov_struct=sm.cov_struct.Independence(),
        ).fit()
        bounds = fit.conf_int()
        for k, term in enumerate(terms):
            odds = [float(np.exp(v)) for v in (fit.params[k], *bounds[k])]
            out.append(
                {
                    "model": " + ".join([*terms, *["step (spline)"] * step]),
                    "term": term,
                    "objects": len(z[term]),
                    "hallucinated": int(said["false"].sum()),
                    "odds ratio": Estimate(*odds, digits=2),
                    "p": float(fit.pvalues[k]),
                }
            )
    return out


def spline(x: np.ndarray, inner: int = 4) -> np.ndarray:
    """Cubic B-splines with knots at quantiles, [n, inner + 4], or fewer where quantiles fall together; they add up to
    1, so they hold the constant.
    """
    low, high = x.min(), x.max()
    knots = np.unique(np.quantile(x, np.linspace(0, 1, inner + 2)[1:-1]))
    knots = knots[(low < knots) & (knots < high)]
    return BSpline.design_matrix(x, np.r_[[low] * 4, knots, [max(high, low + 1)] * 4], 3).toarray()


def by_step(rows: list[dict], fewest: int = 20) -> tuple[dict, list[dict]]:
    """Attention in per cent at each step that at least `fewest` captions of both kinds reach, by kind, and as records
    with the difference.
    """
    longest = max(r["tokens"] for r in rows)
    level, there = np.zeros((len(rows), longest)), np.zeros((len(rows), longest))
    for i, r in enumerate(rows):
        curve = 100 * np.mean(r["attention_by_layer"], 1)[: r["tokens"]]
        level[i, : len(curve)], there[i, : len(curve)] = curve, 1
    bad = np.array([bool(r["hallucinated"]) for r in rows])
    draw = bootstrap.weights(len(rows))
    steps: dict = {"with": {}, "without": {}}
    records = []
    for m in range(longest):
        if min(there[bad, m].sum(), there[~bad, m].sum()) < fewest:
            continue
        many = {}
        for kind, those in (("with", bad), ("without", ~bad)):
            n, total = draw[:, those] @ there[those, m], draw[:, those] @ level[those, m]
            with np.errstate(invalid="ignore", divide="ignore"):
                many[kind] = total / n
            steps[kind][m + 1] = Estimate.of(
                bootstrap.interval(level[those, m].sum() / there[those, m].sum(), many[kind]), digits=2
            )
        gap = bootstrap.interval(
            steps["with"][m + 1].value - steps["without"][m + 1].value, many["with"] - many["without"]
        )
        records.append(
            {"step": m + 1, "captions with": int(there[bad, m].sum()), "captions without": int(there[~bad, m].sum())}
            | {k: steps[k][m + 1] for k in ("with", "without")}
            | {"with minus without": Estimate.of(gap, "+", 2)}
        )
    return steps, records
