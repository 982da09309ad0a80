"""Pairs of captions of a picture, a true one and one with hallucinated objects: read from a file, or made of scenes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..inputs.errors import InputError
from ..inputs.reading import fields, lines
from ..scenes import world
from ..scenes.language import CAPTION_PROMPT, caption
from ..tasks import Item

FIELDS = ("image", "value", "h_value", "question")
SHARE = 0.5  # of the categories of a scene whose names are exchanged in the hallucinated caption


@dataclass(frozen=True)
class Demonstration:
    """What is asked of a picture, and what is answered, truly and not."""

    picture: Item
    question: str
    true: str
    hallucinated: str


def read(file: str, count: int, seed: int = 0) -> list[Demonstration]:
    """`count` demonstrations of a file of JSON lines, drawn without replacement; all where it has no more.

    A line has `image` (a file, looked for from the folder of the JSON lines), `value` (a true caption), `h_value` (the
    same with hallucinated objects) and `question`.

    Raises:
        InputError: for a file, line or picture that is not so.
    """
    place = Path(file).expanduser()
    rows = []
    for _, where, value in lines(place, "demos: the file"):
        row = fields(value, FIELDS, where)
        if wrong := [name for name in FIELDS if not isinstance(row[name], str) or not row[name].strip()]:
            raise InputError(f"{where} should have text as {', '.join(wrong)}")
        if row["value"] == row["h_value"]:
            raise InputError(f"{where} teaches nothing: value and h_value are the same")
        picture = place.parent / Path(row["image"]).expanduser()
        if not picture.is_file():
            raise InputError(f"{where} names a picture that is not there: '{picture}'")
        rows.append(Demonstration(Item(row["image"], None, picture), row["question"], row["value"], row["h_value"]))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


def draw(count: int, seed: int = 0) -> list[Demonstration]:
    """Demonstrations made of scenes of the training split, from the `seed * count`-th on: the true caption, and the
    same with the names of objects that are usual there, but are not in the picture.
    """
    return [one for _, one in zip(range(count), _drawn(seed * count), strict=False)]


def _drawn(start: int) -> Iterator[Demonstration]:
    index = start
    while True:
        scene = world.draw("train", "typical", index)
        index += 1
        if scene.objects:
            exchanged = caption(exchange(scene))
            yield Demonstration(Item(scene.id, None, scene), CAPTION_PROMPT, caption(scene), exchanged)


def exchange(scene: world.Scene) -> world.Scene:
    """The scene as somebody tells it who hallucinates: half of its categories (at least one) are others, by preference
    ones that are usual in that kind of place. Nothing else differs, so that its caption has the same sentences.
    """
    rng = np.random.default_rng([world.SPLITS[scene.split], world.FORMS[scene.form], scene.index, 17])
    there, likely = scene.objects, world.usual(scene.kind)
    order = [world.CATEGORIES[i] for i in rng.permutation(len(world.CATEGORIES))]
    bait = sorted((name for name in order if name not in there), key=lambda name: name not in likely)
    told = [there[i] for i in rng.permutation(len(there))[: max(1, round(SHARE * len(there)))]]
    names = dict(zip(told, bait, strict=False))
    return replace(scene, things=[replace(thing, name=names.get(thing.name, thing.name)) for thing in scene.things])
