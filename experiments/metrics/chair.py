"""CHAIR: how many of the objects that a caption names are not in the picture.

Object Hallucination in Image Captioning (Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156). One pinned,
pure-Python
implementation: words are found by a regular expression, plurals undone, double words joined, synonyms mapped
to COCO's 80 categories by the table in `coco_synonyms.json`.

`python -m experiments.metrics.chair FILE.jsonl` scores captions: a line holds `caption` and `objects` (the categories
in the picture).
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import bootstrap
from .words import singular

_TABLE = json.loads((Path(__file__).parent / "coco_synonyms.json").read_text())
CATEGORY = {word.lower(): category for category, words in _TABLE["synonyms"].items() for word in words}
DOUBLE = _TABLE["double_words"]


@dataclass(frozen=True)
class Mention:
    """An object named in a caption: the words as written, COCO's category, and where they stand in the text."""

    words: str
    category: str
    start: int
    end: int


def mentions(caption: str) -> list[Mention]:
    """Every mention of a COCO object, in order."""
    tokens = [
        (singular(m.group().lower()), m.start(), m.end()) for m in re.finditer(r"[A-Za-z]+(?:-[A-Za-z]+)*", caption)
    ]
    joined, i = [], 0
    while i < len(tokens):
        pair = " ".join(t[0] for t in tokens[i : i + 2])
        gap = caption[tokens[i][2] : tokens[i + 1][1]] if i + 1 < len(tokens) else "."
        # "dining table" is one object, not a table; COCO's own two-word names are all joined
        if (pair in DOUBLE or pair in CATEGORY) and not gap.strip():
            joined.append((DOUBLE.get(pair, pair), tokens[i][1], tokens[i + 1][2]))
            i += 2
        else:
            joined.append(tokens[i])
            i += 1
    words = {word for word, _, _ in joined}
    if {"toilet", "seat"} <= words:  # a toilet seat is no chair
        joined = [token for token in joined if token[0] != "seat"]
    return [Mention(caption[a:b], CATEGORY[word], a, b) for word, a, b in joined if word in CATEGORY]


def drop_unfinished(caption: str) -> str:
    """The caption without a last sentence that does not end, as 64-token results in the literature need."""
    return caption if re.search(r"[.!?][\"')]*\s*$", caption) else (re.findall(r"^.*[.!?]", caption, re.S) or [""])[0]


@dataclass
class Score:
    """Counts of one caption; `hallucinated` are categories named but not there."""

    mentions: list[Mention]
    objects: set[str]
    words: int

    @property
    def named(self) -> set[str]:
        return {m.category for m in self.mentions}

    @property
    def hallucinated(self) -> set[str]:
        return self.named - self.objects

    @property
    def false_mentions(self) -> list[Mention]:
        return [m for m in self.mentions if m.category not in self.objects]


def score(caption: str, objects, unfinished: str = "keep") -> Score:
    """Count one caption against the categories in its picture.

    Args:
        caption: the text.
        objects: names of COCO categories in the picture.
        unfinished: `keep` or `drop` a last sentence that does not end.
    """
    if unfinished not in ("keep", "drop"):
        raise ValueError(f"unfinished is 'keep' or 'drop', not '{unfinished}'")
    text = drop_unfinished(caption) if unfinished == "drop" else caption
    return Score(mentions(text), set(objects), len(text.split()))


METRICS = ("chair_s", "chair_i", "chair_i_unique", "recall", "precision", "f1", "words", "mentions")
_COLUMNS = ("captions", "bad captions", "mentions", "false mentions", "unique", "false unique", "objects", "words")


def counts(scores: list[Score]) -> np.ndarray:
    """One row a caption, float [images, 8]; every metric is a ratio of sums of these columns."""
    return np.array(
        [
            [
                1,
                bool(s.hallucinated),
                len(s.mentions),
                len(s.false_mentions),
                len(s.named),
                len(s.hallucinated),
                len(s.objects),
                s.words,
            ]
            for s in scores
        ],
        float,
    ).reshape(-1, len(_COLUMNS))


def rates(total: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `counts`, [..., 8]; shares in per cent, NaN where nothing was named (for recall: is there),
    `words` and `mentions` per caption.
    """
    n, bad, named, false, unique, false_unique, objects, words = np.moveaxis(total, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = (unique - false_unique) / objects, 1 - false_unique / unique
        return {
            "chair_s": 100 * bad / n,
            "chair_i": 100 * false / named,
            "chair_i_unique": 100 * false_unique / unique,
            "recall": 100 * recall,
            "precision": 100 * precision,
            "f1": 100 * 2 * (unique - false_unique) / (unique + objects),
            "words": words / n,
            "mentions": named / n,
        }


def summary(scores: list[Score], draws: int = 2000, seed: int = 0) -> dict[str, dict]:
    """Every metric with its 95 % bootstrap interval over images: {name: {value, low, high}}, and `n`."""
    return bootstrap.summary(counts(scores), rates, None, draws, seed)


def difference(scores: list[Score], base: list[Score], draws: int = 2000, seed: int = 0) -> dict[str, dict]:
    """Each metric minus the base's on the same images, with a 95 % interval from a bootstrap that draws images in
    pairs.
    """
    return bootstrap.difference(counts(scores), counts(base), rates, None, draws, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--unfinished", choices=("keep", "drop"), default="keep", help="a last sentence that does not end"
    )
    args = parser.parse_args()
    try:
        lines = args.file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {args.file}: {error}")
    by_stack: dict[str, list[Score]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            parser.error(f"{args.file}, line {number} is no JSON: {error}")
        if not isinstance(row, dict) or not {"caption", "objects"} <= row.keys():
            parser.error(
                f"{args.file}, line {number}: a line needs 'caption' and 'objects', found"
                f" {', '.join(row) if isinstance(row, dict) else line[:40]}"
            )
        if not isinstance(row["objects"], list):
            parser.error(
                f"{args.file}, line {number}: 'objects' lists the COCO categories in the picture, it is not"
                f" {json.dumps(row['objects'])} (run.py knows none of your own pictures'; put them in)"
            )
        if not isinstance(row["caption"], str) or not isinstance(stack := row.get("stack", "captions"), str):
            parser.error(f"{args.file}, line {number}: 'caption' and 'stack' are texts")
        there = []
        for name in row["objects"]:
            if str(name).lower() not in CATEGORY:
                from decoders.errors import choices  # slow to import

                parser.error(
                    f"{args.file}, line {number}: {choices(str(name), sorted(set(CATEGORY.values())), 'COCO category')}"
                )
            there.append(CATEGORY[str(name).lower()])
        by_stack.setdefault(stack, []).append(score(row["caption"], there, args.unfinished))
    if not by_stack:
        parser.error(f"{args.file} holds no captions")
    print(json.dumps({stack: summary(scores) for stack, scores in by_stack.items()}, indent=1))


if __name__ == "__main__":
    main()
