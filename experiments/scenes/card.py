"""The card of the embedded model: tables and pictures from the numbers that `evaluate` kept, with the targets they are
held against.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from . import world

FOLDER = Path(__file__).parent / "card"
README = Path(__file__).parent / "README.md"
START, END = "<!-- numbers: written by experiments.scenes.evaluate -->", "<!-- end of numbers -->"
METRICS = {
    "chair_s": "CHAIR_S",
    "chair_i": "CHAIR_I",
    "chair_i_unique": "CHAIR_I unique",
    "recall": "recall",
    "f1": "F1",
    "words": "words",
    "mentions": "mentions",
}
FLOORS = {"shuffled": "floor: picture of another kind of place", "blank": "floor: background alone"}


def rounded(value: Any) -> Any:
    """Numbers with three decimals, to be kept."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return (round(value, 3) if math.isfinite(value) else None) if isinstance(value, float) else value


def _cell(v: dict | None, sign: str = "") -> str:
    if not v or v["value"] is None:
        return ""
    return f"{v['value']:{sign}.1f} [{v['low']:{sign}.1f}, {v['high']:{sign}.1f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    )


def targets(numbers: dict) -> list[tuple[str, float | None, bool]]:
    """(what, value if there is one, whether it is within the target) of what the model is to reach."""
    typical, absent, asked = numbers["forms"]["typical"], numbers["forms"]["absent"], numbers["questions"]["typical"]

    def held(name: str, value: float | None, low: float, high: float = math.inf) -> tuple[str, float | None, bool]:
        bounds = f">= {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        return f"{name} ({bounds})", value, value is not None and low <= value <= high

    one, other = absent["chair_i_unique"]["value"], typical["chair_i_unique"]["value"]

    return [
        held("typical: recall", typical["recall"]["value"], 70),
        held("typical: CHAIR_I unique", typical["chair_i_unique"]["value"], 8, 25),
        held("typical: CHAIR_S", typical["chair_s"]["value"], 30, 65),
        held("absent: CHAIR_I unique, times that of typical", one / other if other else None, 1.5),
        held("typical: positions right, of objects that are there", typical["claims"]["position"]["value"], 70),
        held("POPE random: accuracy", asked["random"]["accuracy"]["value"], 75),
        *(
            held(f"POPE {split}: yes-rate", asked[split]["yes"]["value"], 35, 65)
            for split in ("random", "popular", "adversarial")
        ),
    ]


def text(folder: Path = FOLDER) -> str:
    """Every table, as Markdown; a column for each set of weights that was measured."""
    found = {
        f.stem: json.loads(f.read_text())
        for f in sorted(folder.glob("*.json"), key=lambda f: (f.stem != "shipped", f.stem))
    }
    if not found:
        return "nothing measured yet"
    names, out = list(found), []
    first = found[names[0]]

    def part(title: str, table: str, note: str = "") -> None:
        out.append(fill(f"**{title}**{note and f' ({note})'}", 120) + f"\n\n{table}")

    held = {name: targets(n) for name, n in found.items()}
    rows = [
        [
            held[names[0]][i][0],
            *(
                f"{'none' if held[n][i][1] is None else f'{held[n][i][1]:.3g}'}"
                f" {'ok' if held[n][i][2] else '**missed**'}"
                for n in names
            ),
        ]
        for i in range(len(held[names[0]]))
    ]
    part(
        "Targets",
        _table(["", *names], rows),
        f"test split, greedy, n = {first['count']} scenes; POPE on {first['smaller']}",
    )
    rows = [
        [f"{form}, {n}", *(_cell(found[n]["forms"][form][m]) for m in METRICS)]
        for form in ("typical", "absent", "crowded")
        for n in names
    ]
    rows += [
        [f"{title}, {n}", *(_cell(found[n]["floors"][floor][m]) for m in METRICS)]
        for floor, title in FLOORS.items()
        for n in names
    ]
    rows += [
        [
            f"prompt for a {kind}{' caption' if kind == 'short' else ''}, {n}",
            *(_cell(found[n]["prompts"][kind][m]) for m in METRICS),
        ]
        for kind in ("short", "list")
        for n in names
    ]
    part(
        "Captions",
        _table(["", *METRICS.values()], rows),
        f"typical and absent n = {first['count']}, others n = {first['smaller']}; 95 % intervals, bootstrap over"
        " scenes",
    )
    rows = []
    for title, group, kind in [
        *((form, "forms", form) for form in ("typical", "absent", "crowded")),
        *((title, "floors", floor) for floor, title in FLOORS.items()),
    ]:
        for n in names:
            v = found[n][group][kind]
            rows.append(
                [
                    f"{title}, {n}",
                    *(_cell(v["claims"][k]) for k in ("position", "colour", "size", "count", "relation")),
                    _cell(v["claims"]["position"]["of_all"]),
                    " / ".join(f"{v['tokens'][p]:.0f}" for p in ("p5", "p50", "p95")),
                ]
            )
    part(
        "Attributes, per cent right of what is said of objects that are there",
        _table(
            [
                "",
                "position",
                "colour",
                "size",
                "count",
                "relation",
                "position, hallucinated objects as wrong",
                "tokens, 5th / 50th / 95th percentile",
            ],
            rows,
        ),
    )
    rows = []
    pictures_of = {"typical": "typical", "absent": "absent", "blank": FLOORS["blank"]}
    for form, title in pictures_of.items():
        for split in ("random", "popular", "adversarial"):
            rows += [
                [
                    f"{title}, {split}, {n}",
                    *(
                        _cell(found[n]["questions"][form][split][m])
                        for m in ("accuracy", "precision", "recall", "f1", "yes")
                    ),
                    str(found[n]["questions"][form][split]["n"]),
                ]
                for n in names
            ]
    part("POPE", _table(["", "accuracy", "precision", "recall", "F1", "yes-rate", "questions"], rows))
    kinds = ("colour", "count", "count, several", "position")
    rows = [
        [f"{title}, {n}", *(f"{_cell(q[k])}, n = {q[k]['n']}" for k in kinds)]
        for form, title in pictures_of.items()
        for n in names
        for q in [found[n]["questions"][form]]
    ]
    part("Other questions, per cent right", _table(["", "colour", "count", "of these, on several", "position"], rows))
    rows = [
        [kind, *(f"{_cell(found[n]['hard'][kind])}, n = {found[n]['hard'][kind]['n']}" for n in names)]
        for kind in first["hard"]
    ]
    part(
        "Recall by what makes an object hard to see",
        _table(["", *names], rows),
        "typical; single ones of their category",
    )
    rows = [
        [
            f"{k}{'th' if k > 3 else ('st', 'nd', 'rd')[k - 1]}{' and later' if k == places else ''} object",
            *(f"{_cell(v)}, n = {v['n']}" for n in names for v in [found[n]["along"]["by_order"][k - 1]]),
        ]
        for places in [len(first["along"]["by_order"])]
        for k in range(1, places + 1)
    ]
    rows += [
        [
            f"fifth {k} of the caption",
            *(f"{_cell(v)}, n = {v['n']}" for n in names for v in [found[n]["along"]["by_fifth"][k - 1]]),
        ]
        for k in range(1, len(first["along"]["by_fifth"]) + 1)
    ]
    part("Hallucinated, per cent of the objects first named there", _table(["", *names], rows), "typical")
    rows = [
        ["usual in that kind of place", *(f"{_cell(found[n]['usual'])}, n = {found[n]['usual']['n']}" for n in names)]
    ]
    part("Hallucinated objects, per cent of them", _table(["", *names], rows), "typical")
    rows = [
        [
            f"attention to the picture at {kind} objects, %",
            *(_cell(found[n]["along"]["all_layers"][kind]) for n in names),
        ]
        for kind in ("true", "hallucinated")
    ]
    rows += [
        [title, *(_cell(found[n]["along"][key], "+") for n in names)]
        for title, key in (
            ("hallucinated minus true", "difference"),
            ("the same within fifths of the caption", "difference_same_fifth"),
        )
    ]
    rows.append(
        [
            "chance that a hallucinated object gets less of it than a true one, %",
            *(_cell(found[n]["along"]["auc"]) for n in names),
        ]
    )
    rows += [
        [
            f"layer {k}: true; hallucinated",
            *(
                "; ".join(_cell(found[n]["along"]["by_layer"][k][kind]) for kind in ("true", "hallucinated"))
                for n in names
            ),
        ]
        for k in range(len(first["along"]["by_layer"]))
    ]
    steps = [s for s in (1, 5, 10, 20, 40, 60, 80, 100) if s <= len(first["along"]["by_step"])]
    rows += [
        [
            f"attention to the picture at step {s}, %",
            *(
                _cell(found[n]["along"]["by_step"][s - 1]) if s <= len(found[n]["along"]["by_step"]) else ""
                for n in names
            ),
        ]
        for s in steps
    ]
    part(
        "Attention to the picture",
        _table(["", *names], rows),
        "typical; share of all attention, mean over heads and layers; at the forward that makes the object's first"
        " token; intervals by captions",
    )
    for name in names:
        if decoding := found[name].get("decoding"):
            rows = []
            for form, plans in decoding.items():
                for label, v in plans.items():
                    rows.append([f"{form} `{label}`", *(_cell(v[m]) for m in METRICS)])
                    if "difference" in v:
                        rows.append(
                            [
                                f"minus `[]` ({v['prunes']:.1f} prunes a caption)",
                                *(_cell(v["difference"][m], "+") for m in METRICS),
                            ]
                        )
            part(
                f"Decoders on {name}",
                _table(["", *METRICS.values()], rows),
                f"validation split, n = {found[name]['smaller']}, paired",
            )
    return "\n\n".join(out)


def write(folder: Path = FOLDER) -> None:
    """Put the tables into the card."""
    before, rest = README.read_text().split(START)
    README.write_text(f"{before}{START}\n\n{text(folder)}\n\n{END}{rest.split(END)[1]}")


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
