"""Intervals from a bootstrap over images: an image with all that was said of it is drawn as one, so that what belongs
together stays together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def weights(n: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each of `n` images is drawn, float [draws, n]; the same for the same n and seed, so that differences
    are paired.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)


def interval(point: float, draws: np.ndarray) -> dict[str, float]:
    """{value, low, high}: the point and its 95 % interval; draws that are no numbers are left out."""
    known = draws[np.isfinite(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return {"value": float(point), "low": float(low), "high": float(high)}


def share(hits, of, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """The share of all `of` that are `hits`, in per cent, with its interval and `n`, the number of `of`.

    Args:
        hits, of: numbers of each image, [n].
    """
    table = np.stack([np.asarray(hits, float), np.asarray(of, float)], 1)
    if not len(table) or not table[:, 1].sum():
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    top, bottom = table.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        many = weights(len(table), draws, seed) @ table
        return interval(100 * top / bottom, 100 * many[:, 0] / many[:, 1]) | {"n": int(bottom)}


def auc(named: list[tuple[int, bool, float]], draw: np.ndarray) -> dict[str, float]:
    """The chance, in per cent, that a hallucinated object gets less attention than a true one, with its interval; 50
    says nothing.

    Args:
        named: of each object the number of its caption, whether it is hallucinated, and the attention.
        draw: how often each caption is drawn, [draws, captions].
    """
    table = np.array(named, float).reshape(-1, 3)
    caption, false, level = table[:, 0].astype(int), table[:, 1] == 1, table[:, 2]
    wins, n = (
        np.zeros((draw.shape[1],) * 2),
        [np.bincount(caption[false == kind], minlength=draw.shape[1]) for kind in (False, True)],
    )
    gap = level[~false][:, None] - level[false]
    np.add.at(
        wins, (caption[~false][:, None], caption[false]), (gap > 0) + 0.5 * (gap == 0)
    )  # of true objects of one caption over hallucinated ones of another
    with np.errstate(invalid="ignore"):
        return interval(
            100 * wins.sum() / (n[0].sum() * n[1].sum()),
            100 * ((draw @ wins) * draw).sum(1) / ((draw @ n[0]) * (draw @ n[1])),
        )


Rates = Callable[[np.ndarray], dict[str, np.ndarray]]


def grouped(table: np.ndarray, groups: Sequence | None = None) -> np.ndarray:
    """Sums of rows [n, columns] by group, in the order in which groups come first; without groups, the rows."""
    if groups is None:
        return table
    place = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    out = np.zeros((len(place), table.shape[1]))
    np.add.at(out, [place[g] for g in groups], table)
    return out


def summary(table: np.ndarray, rates: Rates, groups: Sequence | None = None, draws: int = 2000, seed: int = 0) -> dict:
    """Every metric with its 95 % interval: {name: {value, low, high}}, and `n`, the rows.

    Args:
        table: counts of each answer, [n, columns].
        rates: metrics from sums of the columns.
        groups: of each row what it is drawn with, its picture; None: each row by itself.
    """
    if not len(table):
        return {"n": 0}
    point, many = rates(table.sum(0)), rates(weights(len(by := grouped(table, groups)), draws, seed) @ by)
    return {"n": len(table)} | {name: interval(point[name], many[name]) for name in point}


def difference(
    table: np.ndarray, base: np.ndarray, rates: Rates, groups: Sequence | None = None, draws: int = 2000, seed: int = 0
) -> dict:
    """Each metric minus the base's on the same answers, images drawn in pairs: {name: {value, low, high, p}}.

    `p` is two-sided: twice the smaller share of draws on one side of no difference, at least 2 / (draws + 1).
    """
    if len(table) != len(base):
        raise ValueError(f"a paired difference needs the same images: {len(table)} and {len(base)} answers")
    if not len(table):
        return {}
    one, two = grouped(table, groups), grouped(base, groups)
    drawn = weights(len(one), draws, seed)
    a, b, many_a, many_b = rates(one.sum(0)), rates(two.sum(0)), rates(drawn @ one), rates(drawn @ two)
    return {name: interval(a[name] - b[name], gaps := many_a[name] - many_b[name]) | {"p": p_value(gaps)} for name in a}


def p_value(gaps: np.ndarray) -> float:
    """Two-sided, from draws of a difference; never 0, as there are only so many draws."""
    known = gaps[np.isfinite(gaps)]
    if not len(known):
        return float("nan")
    return float(min(1, 2 * (1 + min((known <= 0).sum(), (known >= 0).sum())) / (1 + len(known))))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's correction for several tests (Holm 1979): each p-value times the number of tests not yet rejected, never
    falling.
    """
    values = np.asarray(p, float)
    order = np.argsort(values)
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    out = np.empty_like(values)
    out[order] = np.minimum(1, raised)
    return out
