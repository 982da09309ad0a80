"""The plots of the page, drawn twice: for light and for dark screens."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .page import Plot

COLOURS = {
    "light": ["#1a5fb4", "#c64600", "#26734d", "#813d9c", "#865e3c", "#5e5c64"],
    "dark": ["#78b4ff", "#ffa257", "#6fd3a0", "#dc8add", "#e0b48a", "#c0bfbc"],
}


def both(draw: Callable[[list[str]], plt.Figure]) -> dict[str, bytes]:
    """SVG of a figure in each scheme; `draw` takes the colours of lines."""
    out = {}
    for scheme, colours in COLOURS.items():
        ink = {"light": "#1f2328", "dark": "#e6e6e6"}[scheme]
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with plt.rc_context(
            {name: ink for name in names}
            | {
                "svg.fonttype": "none",
                "svg.hashsalt": "report",
                "font.family": "sans-serif",
                "font.size": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
            }
        ):
            figure = draw(colours)
            file = io.BytesIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
            plt.close(figure)
        out[scheme] = file.getvalue()
    return out


def differences(metrics: dict[str, dict], titles: dict[str, str]) -> Plot | None:
    """Paired differences from the first stack with their intervals."""
    first, *others = metrics
    others = [label for label in others if metrics[label].get("difference")]
    if not others:
        return None
    names = list(titles)

    def draw(colours):
        figure, axis = plt.subplots(figsize=(7, 0.9 + len(names) * (0.24 + 0.17 * len(others))), layout="constrained")
        axis.axvline(0, color="#888888", linewidth=1)
        for j, label in enumerate(others):
            gaps = [metrics[label]["difference"][name] for name in names]
            y = np.arange(len(names)) + (j - (len(others) - 1) / 2) * 0.8 / len(others)
            middle, low, high = (np.array([gap[k] for gap in gaps]) for k in ("value", "low", "high"))
            axis.errorbar(
                middle,
                y,
                xerr=[middle - low, high - middle],
                fmt="osD^v"[j % 5],
                color=colours[(j + 1) % len(colours)],
                capsize=3,
                label=f"{label} - {first}".replace("$", r"\$"),
            )
        axis.set_yticks(range(len(names)), [titles[name] for name in names])
        axis.invert_yaxis()
        axis.set_xlabel("difference, in the metric's own unit")
        figure.legend(loc="outside upper left", ncols=min(2, len(others)))
        return figure

    told = "; ".join(
        f"{label}: " + ", ".join(f"{titles[name]} {metrics[label]['difference'][name]['value']:+.1f}" for name in names)
        for label in others
    )
    return Plot(f"Differences from {first}", both(draw), f"Points with 95 % intervals. {told}")


def attention(curves: dict[str, Sequence[Sequence[float]]]) -> Plot | None:
    """Mean attention to a visual token left, by step, for stacks of which any curves are known, on the pictures of
    which all of these are; steps that a tenth of the captions reach.

    Args:
        curves: by label, for each picture in the same order; empty where not known.
    """
    lines, told = {}, [rows for rows in curves.values() if any(rows)]
    for label, rows in curves.items():
        rows = [row for row, *others in zip(rows, *told, strict=False) if row and all(others)]
        if rows:
            grid = np.full((len(rows), max(map(len, rows))), np.nan)
            for i, row in enumerate(rows):
                grid[i, : len(row)] = row
            steps = np.flatnonzero((~np.isnan(grid)).sum(0) >= max(1, len(rows) / 10)) + 1
            lines[label] = (steps, 100 * np.nanmean(grid[:, steps - 1], 0), len(rows))
    if not lines:
        return None

    def draw(colours):
        figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
        for j, label in enumerate(curves):
            if label in lines:
                steps, level, n = lines[label]
                axis.plot(
                    steps,
                    level,
                    ("-", "--", "-.", ":")[j % 4],
                    color=colours[j % len(colours)],
                    label=f"{label}, {n} captions".replace("$", r"\$"),
                )
        axis.set(xlabel="step m (1 is the prompt)", ylabel="attention per visual token left, %")
        axis.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)
        return figure

    told = "; ".join(
        f"{label} ({n} captions): {level[0]:.2f} % at step 1, {level[len(level) // 2]:.2f} % at step"
        f" {steps[len(level) // 2]}, {level[-1]:.2f} % at step {steps[-1]}"
        for label, (steps, level, n) in lines.items()
    )
    return Plot(
        "Visual attention by step",
        both(draw),
        f"Mean over layers, heads and captions of the attention to a visual token that was left. {told}",
    )
