"""What is said about a scene: true captions of three kinds, questions with their answers, and the reading back of what
a caption claims.

Sentences come from a small grammar. Objects are named with their number, size and colour, with the ninth of the picture
in which they lie, and with how they lie to each other. `claims` reads the same grammar, so that a model's attributes,
counts, places and relations can be held against the scene.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..metrics import chair
from ..metrics.words import plural as many
from ..metrics.words import with_article
from .world import CATEGORIES, COLOURS, FORMS, SIZE, SPLITS, Scene, Thing, usual

CAPTION_PROMPT = "Please describe this image in detail."
PROMPTS = {
    "detailed": (CAPTION_PROMPT, "Describe everything that you see in this image."),
    "short": ("Describe this image in one sentence.", "Give a short caption of this image."),
    "list": ("List the objects in this image.", "Which objects are in this image?"),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
PLACES = {
    (0, 0): ("at the top left", "in the top left corner"),
    (0, 1): ("at the top", "near the top"),
    (0, 2): ("at the top right", "in the top right corner"),
    (1, 0): ("on the left", "on the left side"),
    (1, 1): ("in the middle", "in the center"),
    (1, 2): ("on the right", "on the right side"),
    (2, 0): ("at the bottom left", "in the bottom left corner"),
    (2, 1): ("at the bottom", "near the bottom"),
    (2, 2): ("at the bottom right", "in the bottom right corner"),
}
RELATIONS = ("to the left of", "to the right of", "above", "below")
_OPENERS = (
    "The image shows {s}.",
    "This is a picture of {s}.",
    "In this image we see {s}.",
    "The photo was taken in {s}.",
    "The picture shows {s} with {a}.",
    "This is {s} with {a}.",
    "Here we are in {s}.",
    "It looks like {s}, because there {be} {a}.",
)
_CLOSERS = ("Overall, it looks like {s}.", "All of it makes up {s}.", "Nothing else can be seen in {s}.")
_ONE = (
    "There {be} {a} {w}.",
    "{W} there {be} {a}.",
    "{A} {be} {w}.",
    "{W} we can see {a}.",
    "{A} can be seen {w}.",
    "You can also spot {a} {w}.",
    "{W}, {a} {be} visible.",
    "I notice {a} {w}.",
    "Further on, {a} {be} {w}.",
)
_COLOURED = ("There is {n} {w}, and it is {c}.", "{N} {w} is {c}.", "{W} there is {n}, which is {c}.")
_TWO = (
    "There {be} {a} {w} and {a2} {w2}.",
    "{A} {be} {w}, and {a2} {be2} {w2}.",
    "{W} there {be} {a}, while {a2} {be2} {w2}.",
    "{A} {w} and {a2} {w2} are also visible.",
    "Besides {a} {w}, there {be2} {a2} {w2}.",
    "{W} {be} {a}, and {w2} {be2} {a2}.",
    "While {a} {be} {w}, we find {a2} {w2}.",
)
_RELATION = ("The {n} is {r} the {n2}.", "{R} the {n2} we find the {n}.", "Note that the {n} is {r} the {n2}.")


@functools.cache
def plural(name: str) -> str:
    return f"pairs of {name}" if name in ("scissors", "skis") else many(name)


@functools.cache
def bare(name: str) -> str:
    """The name as one countable thing."""
    return f"pair of {name}" if name in ("scissors", "skis") else name


@functools.cache
def singular(name: str) -> str:
    return with_article(bare(name))


def _upper(words: str) -> str:
    return words[0].upper() + words[1:]


def _phrase(group: list[Thing], rng: np.random.Generator) -> dict[str, str]:
    """A group of one category in words: `a` with its attributes, `n` without, `w` where, `be`, and `c` its colour if it
    has one.
    """
    name, count = group[0].name, len(group)
    extents, colours = {t.extent for t in group}, {t.colour for t in group}
    size = extents.pop() if len(extents) == 1 and rng.random() < 0.7 else ""
    colour = colours.pop() if len(colours) == 1 else None
    shown = colour if colour and rng.random() < 0.75 else ""
    words = " ".join(filter(None, (size, shown, bare(name) if count == 1 else plural(name))))
    cells = list(dict.fromkeys(t.cell for t in group))
    where = [PLACES[c][int(rng.random() < 0.35)] for c in cells]
    return {
        "a": with_article(words) if count == 1 else f"{NUMBERS[count]} {words}",
        "n": singular(name),
        "w": where[0] if len(where) == 1 else ", ".join(where[:-1]) + " and " + where[-1],
        "be": "is" if count == 1 else "are",
        "c": colour if colour and count == 1 else "",
    }


def groups(scene: Scene, rng: np.random.Generator) -> list[list[Thing]]:
    """Things by category, the striking ones first (with some chance)."""
    found: dict[str, list[int]] = {}
    for i, thing in enumerate(scene.things):
        found.setdefault(thing.name, []).append(i)
    weight = {
        n: (
            np.log(max(scene.things[i].size ** 2 * scene.visible[i] * scene.things[i].opacity for i in ids))
            + rng.normal(0, 0.4)
        )
        for n, ids in found.items()
    }
    return [[scene.things[i] for i in found[n]] for n in sorted(found, key=weight.get, reverse=True)]


def caption(scene: Scene, kind: str = "detailed", variant: int = 0) -> str:
    """A true caption.

    Args:
        kind: `detailed` names every object in view with its attributes and place, `short` the place and the most
            striking things, `list` every category.
        variant: another wording.
    """
    rng = np.random.default_rng(
        [SPLITS[scene.split], FORMS[scene.form], scene.index, 11, list(PROMPTS).index(kind), variant]
    )
    queue, place = groups(scene, rng), with_article(scene.kind)
    if kind == "list":
        return _list(queue, rng)
    if not queue:
        return (
            f"The image shows {place}. There is nothing else to see."
            if kind == "detailed"
            else f"An empty {scene.kind}."
        )
    return _short(queue, place, rng) if kind == "short" else _detailed(queue, place, rng)


def _list(queue: list[list[Thing]], rng: np.random.Generator) -> str:
    names = [singular(g[0].name) if len(g) == 1 else f"{NUMBERS[len(g)]} {plural(g[0].name)}" for g in queue]
    if not names:
        return "There are no objects in the image."
    joined = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return ("The image contains {}.", "I can see {}.")[rng.integers(2)].format(joined)


def _short(queue: list[list[Thing]], place: str, rng: np.random.Generator) -> str:
    few = [_phrase(g, rng)["a"] for g in queue[: int(rng.integers(1, 4))]]
    joined = ", ".join(few[:-1]) + " and " + few[-1] if len(few) > 1 else few[0]
    return _upper(("{s} with {a}.", "{a} in {s}.", "this is {s} with {a}.")[rng.integers(3)].format(s=place, a=joined))


def _detailed(queue: list[list[Thing]], place: str, rng: np.random.Generator) -> str:
    opener = _OPENERS[rng.integers(len(_OPENERS))]
    first = _phrase(queue[0], rng)
    text = [opener.format(s=place, a=f"{first['a']} {first['w']}", be=first["be"])]
    told: list[Thing] = []  # single things that may be spoken of again
    if "{a}" in opener:
        told += queue[0] if len(queue[0]) == 1 else []
        queue = queue[1:]
    while queue:
        take = 2 if len(queue) > 1 and rng.random() < 0.5 else 1
        now, queue = queue[:take], queue[take:]
        words = _phrase(now[0], rng)
        forms = _ONE if take == 1 else _TWO
        if take == 2:
            words |= {k + "2": v for k, v in _phrase(now[1], rng).items()}
        elif words["c"] and rng.random() < 0.4:
            forms = _COLOURED
        words |= {"A": _upper(words["a"]), "W": _upper(words["w"]), "N": _upper(words["n"])}
        text.append(forms[rng.integers(len(forms))].format(**words))
        told += [g[0] for g in now if len(g) == 1]
        pair = _related(told, rng)
        if pair and rng.random() < 0.25:
            one, relation, other = pair
            form = _RELATION[rng.integers(len(_RELATION))]
            text.append(form.format(n=bare(one.name), n2=bare(other.name), r=relation, R=_upper(relation)))
    if rng.random() < 0.4:
        text.append(_CLOSERS[rng.integers(len(_CLOSERS))].format(s=place))
    return " ".join(text)


def holds(one: Thing, relation: str, other: Thing, margin: float = 0.0) -> bool:
    """Whether `one` is left of, right of, above or below `other`, by more than `margin` pixels between their
    centres.
    """
    gap = {
        "to the left of": other.x - one.x,
        "to the right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }[relation]
    return gap > margin


def _related(told: list[Thing], rng: np.random.Generator) -> tuple[Thing, str, Thing] | None:
    """The newest of the things told and one before it, with a relation that holds clearly and is the longer of the two
    ways between them.
    """
    if len(told) < 2:
        return None
    one, other = told[-1], told[int(rng.integers(len(told) - 1))]
    across = abs(one.x - other.x) >= abs(one.y - other.y)
    options = RELATIONS[:2] if across else RELATIONS[2:]
    return next(((one, r, other) for r in options if holds(one, r, other, SIZE / 5)), None)


# ------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What is asked, of which kind, and the true answer in a sentence and in one word (or phrase)."""

    kind: str
    name: str
    text: str
    sentence: str
    answer: str


def existence(name: str, there: bool) -> Question:
    """POPE's question."""
    sentence = (
        f"Yes, there is {singular(name)} in the image." if there else f"No, there is no {bare(name)} in the image."
    )
    return Question("existence", name, f"Is there {singular(name)} in the image?", sentence, "yes" if there else "no")


def about(scene: Scene) -> list[Question]:
    """Every question on colour, count and place that has one true answer, of the things in the scene."""
    out = []
    for name in scene.objects:
        things = scene.of(name)
        number, verb = NUMBERS[len(things)], "is" if len(things) == 1 else "are"
        out.append(
            Question(
                "count",
                name,
                f"How many {plural(name)} are there?",
                f"There {verb} {number} {bare(name) if len(things) == 1 else plural(name)}.",
                number,
            )
        )
        if len(things) > 1:
            continue
        place = PLACES[things[0].cell][0]
        out.append(Question("position", name, f"Where is the {bare(name)}?", f"The {bare(name)} is {place}.", place))
        if things[0].colour:
            out.append(
                Question(
                    "colour",
                    name,
                    f"What color is the {bare(name)}?",
                    f"The {bare(name)} is {things[0].colour}.",
                    things[0].colour,
                )
            )
    return out


def questions(scene: Scene, count: int, variant: int = 0) -> list[Question]:
    """Questions for training, half of them on existence: as many true as false ones, half of the false ones on usual
    objects of the place.
    """
    rng = np.random.default_rng([SPLITS[scene.split], FORMS[scene.form], scene.index, 13, variant])
    present = scene.objects
    bait = [n for n in usual(scene.kind) if n not in present]
    other = [n for n in CATEGORIES if n not in present]
    by_kind: dict[str, list[Question]] = {}
    for q in about(scene):
        by_kind.setdefault("several" if q.kind == "count" and q.answer != "one" else q.kind, []).append(q)
    out = []
    for i in range(count):
        if i % 2 and by_kind:
            pool = by_kind[list(by_kind)[rng.integers(len(by_kind))]]
            out.append(pool[rng.integers(len(pool))])
        else:
            there = bool(present) and rng.random() < 0.5
            names = present if there else bait if bait and rng.random() < 0.5 else other
            out.append(existence(names[rng.integers(len(names))], there))
    return out


# ------------------------------------------------------------------------------------------------- reading captions


@dataclass(frozen=True)
class Claim:
    """Something that a text says of an object: `kind` is `size`, `colour`, `count`, `position` (a ninth) or `relation`;
    `other` the second object of a relation.
    """

    kind: str
    name: str
    value: str | int | tuple[int, int]
    other: str | None = None

    def true(self, scene: Scene) -> bool | None:
        """Whether it holds for some object of that category in the scene; None if there is none."""
        things = scene.of(self.name)
        if not things or (self.other and not scene.of(self.other)):
            return None
        if self.kind == "count":
            return len(things) == self.value
        if self.kind == "relation":
            return any(holds(a, self.value, b) for a in things for b in scene.of(self.other) if a is not b)
        return self.value in {{"size": t.extent, "colour": t.colour, "position": t.cell}[self.kind] for t in things}


_WHERE = {phrase: cell for cell, phrases in PLACES.items() for phrase in phrases}
_PLACE = re.compile(r"\b(" + "|".join(sorted(_WHERE, key=len, reverse=True)) + r")\b", re.I)
_BEFORE = re.compile(
    rf"(?:\b({'|'.join(NUMBERS.values())}|an?) )?(?:\b(small|large) )?(?:\b({'|'.join(COLOURS)}) )?(?:pairs? of )?$",
    re.I,
)
_AFTER = re.compile(rf"\bis ({'|'.join(COLOURS)})\b", re.I)
_RELATED = re.compile(rf"\b({'|'.join(RELATIONS)})\b", re.I)


def claims(text: str) -> Iterator[Claim]:
    """What a text says of sizes, colours, counts, places and relations, read by the grammar of the captions."""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        found = chair.mentions(sentence)
        for m in found:
            number, size, colour = _BEFORE.search(sentence[: m.start]).groups()
            if number:
                yield Claim("count", m.category, next((n for n, w in NUMBERS.items() if w == number.lower()), 1))
            if size:
                yield Claim("size", m.category, size.lower())
            if colour:
                yield Claim("colour", m.category, colour.lower())
        said = _AFTER.search(sentence)
        if said and len(found) == 1:
            yield Claim("colour", found[0].category, said[1].lower())
        relation = _RELATED.search(sentence)
        if relation and len(found) == 2:
            one, other = found if relation.start() > found[0].start else found[::-1]
            yield Claim("relation", one.category, relation[1].lower(), other.category)
        else:
            yield from _places(sentence, found)


def _places(sentence: str, found: list[chair.Mention]) -> Iterator[Claim]:
    """Each object takes the place before it that nobody took, else those after it."""
    spots = [(m.start(), _WHERE[m[1].lower()]) for m in _PLACE.finditer(sentence)]
    waiting: list[tuple[int, int]] = []
    events = sorted([*((m.start, m) for m in found), *spots], key=lambda e: e[0])
    holder: str | None = None
    for _, what in events:
        if isinstance(what, chair.Mention):
            holder = what.category
            for cell in waiting:
                yield Claim("position", holder, cell)
            holder, waiting = (None if waiting else holder), []
        elif holder:
            yield Claim("position", holder, what)
        else:
            waiting.append(what)
