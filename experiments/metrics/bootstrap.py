"""Intervals from a bootstrap over images: an image with all that was said of it is drawn as one, so that what belongs together stays together."""

from __future__ import annotations

import numpy as np


def weights(n: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each of `n` images is drawn, float [draws, n]; the same for the same n and seed, so that differences are paired."""
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
