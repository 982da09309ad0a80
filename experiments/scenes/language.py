"""What is said about a scene: true captions of several sentences, and yes/no questions."""

from __future__ import annotations

import functools

import inflect
import numpy as np

from .world import CATEGORIES, SPLITS, Scene, Thing, usual

CAPTION_PROMPT = "Please describe this image in detail."
_OPENERS = ("The image shows {s}.", "This is a picture of {s}.", "In this image we see {s}.", "The photo was taken in {s}.")
_CLOSERS = ("Overall, it looks like {s}.", "All of it makes up {s}.")
_ONE = ("There {be} {np} {where}.", "{Where} there {be} {np}.", "{Np} {be} {where}.", "{Where} we can see {np}.", "{Np} can be seen {where}.")
_TWO = ("There {be} {np} {where} and {np2} {where2}.", "{Np} {be} {where}, and {np2} {be2} {where2}.", "{Where} there {be} {np}, while {np2} {be2} {where2}.", "We can also see {np} and {np2}.")
_inflect = inflect.engine()


@functools.cache
def plural(name: str) -> str:
    return {"person": "people", "skis": "skis", "scissors": "scissors"}.get(name) or _inflect.plural(name)


@functools.cache
def singular(name: str) -> str:
    return "a pair of scissors" if name == "scissors" else _inflect.a(name)


def _phrase(group: list[Thing], rng: np.random.Generator) -> dict[str, str]:
    name, count = group[0].name, len(group)
    if count == 1:
        size = group[0].size
        word = "small " if size < 18 else "large " if size > 44 else ""
        bare = name if name != "scissors" else "pair of scissors"
        np_ = (f"a {word}{bare}" if word and rng.random() < 0.7 else singular(name))
    else:
        np_ = f"{('', '', 'two', 'three')[count]} {plural(name)}"
    return {"np": np_, "be": "is" if count == 1 else "are", "where": group[0].where}


def caption(scene: Scene, variant: int = 0) -> str:
    """A true caption: the place, then every object in view, the striking ones first."""
    rng = np.random.default_rng([SPLITS[scene.split], scene.index, 11, variant])
    place = _inflect.a(scene.kind)
    text = [_OPENERS[rng.integers(len(_OPENERS))].format(s=place)]
    groups: dict[str, list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault(thing.name, []).append(thing)
    if not groups:
        return text[0] + " There is nothing else to see."
    weight = {n: np.log(max(t.size**2 * t.visible * t.opacity for t in g)) + rng.normal(0, 0.4) for n, g in groups.items()}
    queue = [groups[n] for n in sorted(groups, key=weight.get, reverse=True)]
    while queue:
        take = 2 if len(queue) > 1 and rng.random() < 0.55 else 1
        words = _phrase(queue.pop(0), rng)
        if take == 2:
            words |= {k + "2": v for k, v in _phrase(queue.pop(0), rng).items()}
        form = (_ONE, _TWO)[take - 1][rng.integers(len((_ONE, _TWO)[take - 1]))]
        words |= {"Np": words["np"][0].upper() + words["np"][1:], "Where": words["where"][0].upper() + words["where"][1:]}
        text.append(form.format(**words))
    if rng.random() < 0.5:
        text.append(_CLOSERS[rng.integers(len(_CLOSERS))].format(s=place))
    return " ".join(text)


def question(name: str) -> str:
    return f"Is there {singular(name)} in the image?"


def answer(name: str, there: bool) -> str:
    return f"Yes, there is {singular(name)} in the image." if there else f"No, there is no {name} in the image."


def questions(scene: Scene, count: int, variant: int = 0) -> list[tuple[str, str]]:
    """Balanced yes/no questions on existence; half of the absent objects asked for are usual ones of the place."""
    rng = np.random.default_rng([SPLITS[scene.split], scene.index, 13, variant])
    present = scene.objects
    bait = [n for n in usual(scene.kind) if n not in present]
    other = [n for n in CATEGORIES if n not in present]
    pairs = []
    for i in range(count):
        there = bool(present) and (i + variant) % 2 == 0
        pool = present if there else bait if bait and rng.random() < 0.5 else other
        name = pool[rng.integers(len(pool))]
        pairs.append((question(name), answer(name, there)))
    return pairs
