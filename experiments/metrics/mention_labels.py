"""Sentences whose mentions of COCO objects are marked by hand, and how well the rules of `chair.py` and of
`chair_context.py` find them; `python -m experiments.metrics.mention_labels` prints it.

They are in three files in `labelled/`: `before.txt` was written before the rules of `chair_context.py`, which were made
on it; `after.txt` when those rules were done, and none was changed on it; `plain.txt` later, and some rules were made
milder on it. The head of `before.txt` says what counts as a mention. All but those of `plain.txt` were chosen to be
hard: their shares say which rule reads better, not how often a rule errs on the captions of a model.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from . import bootstrap, chair, chair_context
from .chair import Mention

_FOLDER = Path(__file__).parent / "labelled"
SETS = {
    "before": "hard, the rules were made on them",
    "plain": "plain, some rules were made milder on them",
    "after": "hard, held out",
}
RULES = {"published": chair.mentions, "context": chair_context.mentions}


def labelled(name: str) -> list[tuple[str, list[Mention]]]:
    """The sentences of one of `SETS`, each with the mentions that are marked in it."""
    out = []
    for line in (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        text, marked = "", []
        for plain, words, category in re.findall(r"([^\[]*)(?:\[([^\]|]*)\|?([^\]]*)\])?", line):
            text += plain
            if words:
                marked.append(Mention(words, category or words, len(text), len(text) + len(words)))
                text += words
        out.append((text, marked))
    return out


def agreement(found: list[Mention], marked: list[Mention]) -> int:
    """How many of the mentions found are marked: of the same category, and with words in common."""
    left = list(marked)
    for mention in found:
        same = (m for m in left if m.category == mention.category and m.start < mention.end and mention.start < m.end)
        if match := next(same, None):
            left.remove(match)
    return len(marked) - len(left)


def rates(name: str, rule: str) -> dict[str, dict[str, float]]:
    """`precision` and `recall` of one of `RULES` on one of `SETS`, in per cent, each with its 95 % interval, from a
    bootstrap over sentences, and `n`: the mentions found, and those marked.
    """
    pairs = [(RULES[rule](text), marked) for text, marked in labelled(name)]
    right, found, there = np.array([(agreement(f, m), len(f), len(m)) for f, m in pairs]).T
    return {"precision": bootstrap.share(right, found), "recall": bootstrap.share(right, there)}


def table() -> str:
    """`rates` of every rule on every set: a table of Markdown."""
    lines = ["| sentences | marked | rule | found | precision, % | recall, % |", "|---|---|---|---|---|---|"]
    for name, told in SETS.items():
        for rule in RULES:
            precision, recall = rates(name, rule).values()
            shares = " | ".join(f"{v['value']:.1f} [{v['low']:.1f}, {v['high']:.1f}]" for v in (precision, recall))
            head = f"{len(labelled(name))} {told} (`{name}.txt`) | {recall['n']}"
            lines.append(f"| {head} | {rule} | {precision['n']} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
