"""Answers that got worse, with what was pruned shown on the picture."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from decoders import hf

from ..metrics import bootstrap, chair
from ..results import Estimate, Sheet
from ..runner import generate
from .base import Cell, Report, Study, expand, short


@dataclass
class Failures(Study):
    """Captions of one cell beside the base's: how many got worse and better, what was lost and what was made up, and
    the worst of them with the patches left.

    base, cell: their lines. The cell's decoders tell the prompt tokens that prunes kept (`prunes`, each with `kept`).
    shown: how many of the worst are drawn, generated once more, as the store keeps no sets; patches are laid over the
    whole picture, as they lie where the processor does not crop.
    """

    base: str = "decoder=[]"
    cell: str = ""
    shown: int = 8

    def lines(self) -> list[str]:
        return expand([self.base, self.cell])

    def wanted(self) -> list[str]:
        return ["chair_i"]

    def report(self, cells: dict[str, Cell], folder: Path) -> Report:
        base, cell = (cells[expand([line])[0]] for line in (self.base, self.cell))
        before = {r["image"]: r for r in base.rows}
        pairs = [(before[r["image"]], r) for r in cell.rows if r["image"] in before]
        scores = [tuple(chair.score(r["caption"], r["objects"]) for r in pair) for pair in pairs]
        false = np.array([len(b.hallucinated) - len(a.hallucinated) for a, b in scores])
        found = np.array([len(b.named & b.objects) - len(a.named & a.objects) for a, b in scores])
        kinds = {
            "more hallucinated objects": false > 0,
            "as many hallucinated objects": false == 0,
            "fewer hallucinated objects": false < 0,
            "more true objects": found > 0,
            "fewer true objects": found < 0,
            "worse in both": (false > 0) & (found < 0),
        }
        counts = [
            {"captions with": name, "n": len(pairs), "%": Estimate.of(bootstrap.share(those, np.ones(len(pairs))))}
            for name, those in kinds.items()
        ]
        made, lost = Counter(), Counter()
        for a, b in scores:
            made.update(b.hallucinated - a.hallucinated)
            lost.update((a.named & a.objects) - b.named)
        names = [
            {"object": n, "made up only with the cell": made[n], "named only by the base": lost[n]}
            for n, _ in (made + lost).most_common(30)
        ]
        worse = [i for i in range(len(pairs)) if found[i] < false[i]]
        worst = sorted(worse, key=lambda i: (found[i] - false[i], pairs[i][0]["image"]))[: self.shown]
        told = [
            {
                "picture": a["image"],
                "there": ", ".join(a["objects"]),
                short(self.base): a["caption"],
                short(self.cell): b["caption"],
            }
            for a, b in (pairs[i] for i in worst)
        ]
        page = folder / f"{self.name}.html"
        page.write_text(_page(self.title, [pairs[i] for i in worst]))
        return Report(
            self.title,
            [Sheet("What became of captions", counts), Sheet("Objects", names), Sheet("The worst", told)],
            self._drawn(cell, [pairs[i] for i in worst]),
            [page],
        )

    def _drawn(self, cell: Cell, pairs: list[tuple[dict, dict]]):
        """The pictures of the worst, and the share of layers that kept each patch at the last prune."""
        if not pairs:
            return None
        speaker, made_by = cell.speaker(), generate.plan(cell.config.decoder)
        items = {item.id: item for item in cell.items}
        opened = [(items[b["image"]], items[b["image"]].open()) for _, b in pairs]
        pictures = [picture for _, picture in opened]
        inputs = generate.batch(speaker, opened)
        again, _ = generate.answers(speaker, made_by, opened, inputs)
        told = next((v for v in made_by.stack.record.values() if isinstance(v, list) and v and "prunes" in v[0]), None)
        across = min(4, len(pairs))
        deep = -(-len(pairs) // across)
        figure, axes = plt.subplots(
            2 * deep, across, figsize=(2.9 * across, 6 * deep), layout="constrained", squeeze=False
        )
        for i, (picture, (a, b)) in enumerate(zip(pictures, pairs, strict=False)):
            above, below = axes[2 * (i // across), i % across], axes[2 * (i // across) + 1, i % across]
            above.imshow(picture)
            lost = sorted(
                ({m["object"] for m in a["mentions"]} & set(a["objects"])) - {m["object"] for m in b["mentions"]}
            )
            made = sorted(set(b["hallucinated"]) - set(a["hallucinated"]))
            above.set_title(
                "\n".join(
                    fill(f"{what}: {', '.join(names) or 'none'}", 42)
                    for what, names in (("lost", lost), ("made up", made))
                ),
                fontsize=8,
            )
            image = hf.placeholder_ids(speaker.model.config).get("image", -1)
            visual = (inputs["input_ids"][i] == image).nonzero().flatten().tolist()
            side = int(len(visual) ** 0.5)
            if told and told[i]["prunes"] and side * side == len(visual) > 0:
                kept = np.zeros(len(visual))
                place = {token: k for k, token in enumerate(visual)}
                sets = told[i]["prunes"][-1]["kept"]
                for one in sets:
                    kept[[place[t] for t in one if t in place]] += 1 / len(sets)
                share = kept.reshape(side, side)[
                    np.ix_(
                        np.arange(picture.height) * side // picture.height,
                        np.arange(picture.width) * side // picture.width,
                    )
                ]
                below.imshow((np.asarray(picture) * (0.15 + 0.85 * share[..., None])).astype(np.uint8))
                other = "" if again[i]["caption"] == b["caption"] else "; another caption this time"
                below.set_title(
                    f"kept by more layers: brighter\n(the last of {len(told[i]['prunes'])} prunes{other})", fontsize=8
                )
        for axis in axes.flat:
            axis.axis("off")
        figure.suptitle(self.title)
        return figure


def _page(title: str, pairs: list[tuple[dict, dict]]) -> str:
    """The worst captions side by side; what models say is escaped."""
    parts = []
    for a, b in pairs:
        cells = "".join(f"<td>{_marked(row)}</td>" for row in (a, b))
        objects = html.escape(", ".join(a["objects"]))
        parts.append(f"<tr><th>{html.escape(a['image'])}<br><small>{objects}</small></th>{cells}</tr>")
    head = "".join(f"<th>{html.escape(row['stack'])}</th>" for row in (pairs[0] if pairs else ()))
    style = (
        "body{font:15px sans-serif;max-width:70rem;margin:2rem"
        " auto}td,th{vertical-align:top;padding:.5rem;border-top:1px solid #ccc;text-align:left}b{color:#b00020}"
    )
    title = html.escape(title)
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<table><tr><th></th>{head}</tr>{''.join(parts)}</table>\n"
    )


def _marked(row: dict) -> str:
    """A caption with its hallucinated words bold."""
    out, at = [], 0
    for m in row["mentions"]:
        if m["object"] in row["hallucinated"]:
            out += [
                html.escape(row["caption"][at : m["start"]]),
                f"<b>{html.escape(row['caption'][m['start'] : m['end']])}</b>",
            ]
            at = m["end"]
    return "".join([*out, html.escape(row["caption"][at:])])
