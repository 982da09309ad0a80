"""Sentences whose mentions of COCO objects are marked by hand, and how well a rule finds them.

They are in two files in `labelled/`: `before.txt` was written before the rules of `chair_context.py`, which were made
on it; `after.txt` when those rules were done, which have not been changed since. The head of `before.txt` says what
counts as a mention. Most sentences were chosen to be hard: shares say which rule reads better, not how often a rule
errs on the captions of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .chair import Mention

_FOLDER = Path(__file__).parent / "labelled"


def labelled(half: str) -> list[tuple[str, list[Mention]]]:
    """The sentences of a half (`before` or `after`) of the labelled set, and the mentions that are marked in them."""
    out = []
    for line in (_FOLDER / f"{half}.txt").read_text(encoding="utf-8").splitlines():
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


def table(rules: dict[str, Callable[[str], list[Mention]]]) -> str:
    """Precision and recall of rules, by their names, on both halves: a table of markdown."""
    lines = ["| half | sentences | mentions | rule | found | precision % | recall % |", "|---|---|---|---|---|---|---|"]
    for half in ("before", "after"):
        rows = labelled(half)
        for rule, find in rules.items():
            found = [find(text) for text, _ in rows]
            right = sum(agreement(f, marked) for f, (_, marked) in zip(found, rows, strict=True))
            named, there = sum(map(len, found)), sum(len(marked) for _, marked in rows)
            shares = f"{100 * right / named:.1f} | {100 * right / there:.1f}"
            lines.append(f"| {half} | {len(rows)} | {there} | {rule} | {named} | {shares} |")
    return "\n".join(lines)
