"""The embedded model's own pictures: to be described, or asked about."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from decoders.errors import choices

from ..inputs.errors import InputError
from ..metrics import pope
from ..scenes import world
from ..scenes.language import existence
from .base import Captions, Item
from .pope import YesNo, probe_item


def draw(split: str, form: str, start: int, count: int) -> list[world.Scene]:
    """Scenes of a split (`train`, `validation`, `test`) in one form (`typical`, `absent`, `crowded`)."""
    for kind, given, valid in (("split", split, world.SPLITS), ("form", form, world.FORMS)):
        if given not in valid:
            raise InputError(choices(given, valid, f"{kind} of scenes"))
    if start < 0 or count < 1:
        raise InputError(f"scenes are counted from 0, and at least one is needed, not {count} from {start} on")
    return [world.draw(split, form, index) for index in range(start, start + count)]


@dataclass
class Scenes(Captions):
    """Descriptions of `count` scenes of a split in one form, from the `start`-th on."""

    split: str
    form: str
    start: int = 0
    count: int = 100

    @property
    def title(self) -> str:
        return f"{self.form} scenes of the {self.split} split"

    def items(self) -> list[Item]:
        return [Item(s.id, s.objects, s) for s in draw(self.split, self.form, self.start, self.count)]


COUNTED = 500  # typical scenes from which it is counted what is frequent and what stands together


@functools.cache  # drawing them takes seconds, and the cells of a study ask again and again
def _counted(split: str) -> dict[str, list[str]]:
    """By scene, the objects of those that are counted."""
    return {s.id: s.objects for s in draw(split, "typical", 0, COUNTED)}


@dataclass
class ScenesPope(YesNo):
    """POPE's questions on scenes; what is frequent and what stands together is counted from typical scenes of the same
    split.
    """

    split: str
    form: str
    probes: str = "adversarial"
    start: int = 0
    count: int = 100
    per_image: int = 3

    @property
    def title(self) -> str:
        return f"POPE, {self.probes}, on {self.form} scenes of the {self.split} split"

    def items(self) -> list[Item]:
        chosen = draw(self.split, self.form, self.start, self.count)
        scenes = {s.id: s for s in (draw(self.split, self.form, 0, self.start) if self.start else []) + chosen}
        if self.probes not in pope.SPLITS:
            raise InputError(choices(self.probes, pope.SPLITS, "kind of probes"))
        counted = _counted(self.split)
        found = pope.probes({k: s.objects for k, s in scenes.items()}, self.probes, self.per_image, counted=counted)
        asked = {s.id for s in chosen}  # a picture's questions are the same in every part
        return [
            probe_item(p, scenes[p.image].objects, scenes[p.image], existence(p.name, p.there).text)
            for p in found
            if p.image in asked
        ]
