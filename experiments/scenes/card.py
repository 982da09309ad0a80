"""The card of the embedded model: tables (`card_tables.py`) and pictures from the numbers that `evaluate` kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from . import card_tables, world

FOLDER = Path(__file__).parent / "card"
START, END = "<!-- numbers: written by experiments.scenes.evaluate -->", "<!-- end of numbers -->"


def rounded(value: Any) -> Any:
    """Numbers with three decimals, to be kept."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return (round(value, 3) if math.isfinite(value) else None) if isinstance(value, float) else value


def text(folder: Path = FOLDER) -> str:
    """Every table, as Markdown; a column for each set of weights that was measured."""
    found = {
        f.stem: json.loads(f.read_text())
        for f in sorted(folder.glob("*.json"), key=lambda f: (f.stem != "shipped", f.stem))
    }
    return "\n\n".join(card_tables.every(found)) if found else "nothing measured yet"


def write(folder: Path = FOLDER) -> None:
    """Put the tables into the card, the README beside their folder, if it has a place for them."""
    card = folder.resolve().parent / "README.md"
    if not card.exists() or START not in card.read_text():
        return
    before, rest = card.read_text().split(START)
    card.write_text(f"{before}{START}\n\n{text(folder)}\n\n{END}{rest.split(END)[1]}")


def _band(axis, x, values: list[dict], label: str, colour: str) -> None:
    axis.plot(x, [v["value"] for v in values], color=colour, label=label, marker="o", markersize=3)
    axis.fill_between(x, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.2)


def pictures(numbers: dict, matrices: dict[str, np.ndarray], folder: Path) -> None:
    """`phenomenon.png` and `priors.png`."""
    along = numbers["along"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    x = range(1, len(along["by_order"]) + 1)
    _band(axes[0, 0], x, along["by_order"], "objects", "tab:red")
    axes[0, 0].set(
        title="Hallucinated, by place in the caption",
        xlabel="k-th object named (the last: and later)",
        ylabel="%",
        ylim=(0, None),
    )
    _band(axes[0, 1], range(1, len(along["by_step"]) + 1), along["by_step"], "mean over layers", "tab:blue")
    axes[0, 1].set(
        title="Attention to the picture, by step",
        xlabel="step m (1 is the prefill)",
        ylabel="% of all attention",
        ylim=(0, None),
    )
    image = axes[1, 0].imshow(along["by_step_and_layer"], aspect="auto", origin="lower", cmap="viridis")
    axes[1, 0].set(title="Attention to the picture, by step and layer", xlabel="step m", ylabel="layer")
    figure.colorbar(image, ax=axes[1, 0], label="%")
    layers = np.arange(len(along["by_layer"]))
    for kind, colour, shift in (("true", "tab:green", -0.1), ("hallucinated", "tab:red", 0.1)):
        v = [layer[kind] for layer in along["by_layer"]]
        value, low, high = (np.array([p[k] for p in v]) for k in ("value", "low", "high"))
        axes[1, 1].errorbar(
            layers + shift,
            value,
            [value - low, high - value],
            fmt="o",
            color=colour,
            label=f"at {kind} objects",
            capsize=3,
        )
    axes[1, 1].set(title="Attention to the picture when an object is named", xlabel="layer", ylabel="%", ylim=(0, None))
    axes[1, 1].legend(frameon=False)
    figure.savefig(folder / "phenomenon.png", dpi=90)
    plt.close(figure)
    order = _order(matrices["training"])
    figure, axes = plt.subplots(1, 3, figsize=(24, 9), layout="constrained", sharey=True)
    for axis, (name, title) in zip(
        axes,
        (
            ("training", "training captions (typical scenes)"),
            ("typical", "typical test scenes: what is there"),
            ("said", "what the model says of them"),
        ),
        strict=False,
    ):
        image = axis.imshow(matrices[name][np.ix_(order, order)], vmin=0, vmax=1, cmap="magma")
        axis.set_title(title)
        axis.set_xticks(range(len(order)), [world.CATEGORIES[i] for i in order], rotation=90, fontsize=6)
        axis.set_yticks(range(len(order)), [world.CATEGORIES[i] for i in order], fontsize=6)
    figure.colorbar(image, ax=axes, label="share of those with the row's object that have the column's", shrink=0.8)
    figure.savefig(folder / "priors.png", dpi=60)
    plt.close(figure)


def _order(table: np.ndarray) -> list[int]:
    """Categories by the kind of scene in which they are most usual, so that companions stand side by side."""
    kinds = list(world.KINDS)
    home = {n: max(range(len(kinds)), key=lambda k, n=n: world.usual(kinds[k]).get(n, 0)) for n in world.CATEGORIES}
    return sorted(
        range(len(world.CATEGORIES)),
        key=lambda i: (
            home[world.CATEGORIES[i]],
            -world.usual(kinds[home[world.CATEGORIES[i]]]).get(world.CATEGORIES[i], 0),
        ),
    )
