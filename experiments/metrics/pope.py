"""POPE: yes/no questions on objects that are there and on objects that are not.

Evaluating Object Hallucination in Large Vision-Language Models (Li et al. 2023, https://arxiv.org/abs/2305.10355). For
every picture as many objects that are in it as objects that are not; the latter are drawn at `random`, are the most
`popular` of the whole set, or (`adversarial`) those that most often stand beside the objects asked for.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import bootstrap

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Probe:
    """A question: whether `name` is in the picture `image`, and whether it is there."""

    image: str
    name: str
    there: bool


def probes(
    objects: dict[str, list[str]],
    split: str,
    per_image: int = 3,
    seed: int = 0,
    counted: dict[str, list[str]] | None = None,
) -> list[Probe]:
    """Questions on every picture with at least `per_image` categories.

    Args:
        objects: picture -> the categories in it.
        split: `random`, `popular` or `adversarial`.
        per_image: objects there, and objects not there, that each picture is asked for.
        seed: of the draws.
        counted: pictures from which it is counted what is frequent and what stands together; without it, `objects`, as
            in the official script.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; valid: {', '.join(SPLITS)}")
    known = list((counted or objects).values())
    frequency = Counter(name for names in known for name in set(names))
    popular = sorted(frequency, key=lambda n: (-frequency[n], n))
    beside: dict[str, Counter] = defaultdict(Counter)
    for names in known:
        for name in set(names):
            beside[name].update(set(names) - {name})
    out = []
    for number, (image, names) in enumerate(objects.items()):
        present = sorted(set(names))
        if len(present) < per_image:
            continue
        rng = np.random.default_rng([seed, number])
        asked: set[str] = set(present)
        for name in rng.permutation(present)[:per_image].tolist():
            if split == "random":
                order = rng.permutation(popular).tolist()
            elif split == "popular":
                order = popular
            else:
                order = sorted(popular, key=lambda n, to=name: (-beside[to][n], -frequency[n], n))
            other = next((n for n in order if n not in asked), None)
            if other is None:
                break
            asked.add(other)
            out += [Probe(image, name, True), Probe(image, other, False)]
    return out


def yes(answer: str) -> bool:
    """How an answer is read: a no if its first sentence holds the word no or not, else a yes, even where it is empty.

    POPE's own script does the same, but only where the word stands between spaces or commas as `No`, `no` or `not`: it
    takes `NO` and `No!` for a yes.
    """
    words = re.findall(r"[a-z']+", answer.split(".")[0].lower())
    return not {"no", "not"} & set(words)


def neither(answer: str) -> bool:
    """Whether an answer's first sentence says neither yes nor no; `yes` reads most such answers as a yes."""
    return not {"yes", "no", "not"} & set(re.findall(r"[a-z']+", answer.split(".")[0].lower()))


METRICS = ("accuracy", "precision", "recall", "f1", "yes")


def counts(there: Sequence[bool], said: Sequence[bool]) -> np.ndarray:
    """One row a question, float [questions, 4]: true and false yes, true and false no."""
    table = np.zeros((len(there), 4))
    for row, (true, answer) in zip(table, zip(there, said, strict=True), strict=False):
        row[2 * (not answer) + (answer != true)] = 1
    return table


def rates(total: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics from sums of `counts`, [..., 4], in per cent; `yes` is the share of yes."""
    ty, fy, tn, fn = np.moveaxis(total, -1, 0)
    n = ty + fy + tn + fn
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = ty / (ty + fy), ty / (ty + fn)
        out = {
            "accuracy": (ty + tn) / n,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes": (ty + fy) / n,
        }
    return {name: 100 * value for name, value in out.items()}


def summary(asked: list[Probe], said: list[bool], draws: int = 2000, seed: int = 0) -> dict:
    """Every metric with its 95 % interval over pictures, in per cent, and `n`, the questions."""
    if len(asked) != len(said):
        raise ValueError(f"{len(asked)} questions and {len(said)} answers")
    return bootstrap.summary(counts([p.there for p in asked], said), rates, [p.image for p in asked], draws, seed)
