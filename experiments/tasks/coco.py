"""COCO val2014: descriptions scored by CHAIR, and POPE's questions made from the annotations.

Pictures and annotations are published at https://cocodataset.org/#download (2014 Val images, 2014 Train/Val
annotations).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from decoders.errors import choices

from ..inputs import reading
from ..inputs.errors import InputError
from ..metrics import chair, pope, words
from .base import Captions, Item
from .pope import YesNo, probe_item

PUBLISHED = "https://cocodataset.org/#download"
NAMED = {
    p.stem.removeprefix("coco_ids_"): p for p in sorted(Path(__file__).parent.glob("coco_ids_*.txt"))
}  # published lists
SIZE = 500  # pictures of the fixed list


def fixed(ids: Iterable[int], size: int = SIZE) -> list[int]:
    """The fixed list: the `size` ids with the smallest SHA-256 of `chair ID`, sorted.

    A rule that depends on nothing but the ids: not on the order of a file or of a folder, nor on the version of a
    random generator.
    """
    return sorted(sorted(ids, key=lambda i: hashlib.sha256(f"chair {i}".encode()).hexdigest())[:size])


def listed(ids: str) -> list[int]:
    """Image ids of a published list, by its name in `NAMED`, or of someone's own file: a JSON list, or numbers with
    blanks or commas between. Raises InputError.
    """
    place = NAMED.get(ids) or Path(ids).expanduser()
    if not place.is_file():
        raise InputError(
            f"no list of image ids '{ids}': null is the fixed list, {', '.join(NAMED)} a published one, anything else a"
            " file with ids"
        )
    text = "\n".join(line.split("#")[0] for line in place.read_text(encoding="utf-8").splitlines())
    try:
        found = [
            int(i) for i in (json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split())
        ]
    except (ValueError, TypeError) as error:
        raise InputError(f"'{ids}' should hold image ids, whole numbers: {error}") from error
    twice = len(found) - len(set(found))
    if twice or not found:
        raise InputError(
            f"'{ids}' holds {len(found)} image ids"
            + (f", {twice} of them twice" if twice else "; at least one is needed")
        )
    return found


def instances(path: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """From `instances_val2014.json`: every picture's file name, and the categories annotated in it, sorted. Raises
    InputError.
    """
    what = "COCO's file of instances"
    found = reading.fields(
        reading.load(path, what, PUBLISHED, dict), ("images", "annotations", "categories"), f"{what} '{path}'"
    )
    try:
        names = {row["id"]: row["name"] for row in found["categories"]}
        files = {row["id"]: row["file_name"] for row in found["images"]}
        objects: dict[int, set[str]] = {i: set() for i in files}
        for row in found["annotations"]:
            objects[row["image_id"]].add(names[row["category_id"]])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{what} '{path}' is not as COCO's: an entry without, or of an unknown, {error}; it is published at"
            f" {PUBLISHED}"
        ) from error
    return files, {i: sorted(found) for i, found in objects.items()}


def captioned(path: str) -> dict[int, set[str]]:
    """From `captions_val2014.json`: the categories that a picture's reference captions mention. Raises InputError."""
    what = "COCO's file of captions"
    found = reading.fields(reading.load(path, what, PUBLISHED, dict), ("annotations",), f"{what} '{path}'")
    said: dict[int, set[str]] = defaultdict(set)
    try:
        for row in found["annotations"]:
            said[row["image_id"]].update(m.category for m in chair.mentions(row["caption"]))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{what} '{path}' is not as COCO's: an entry without {error}; it is published at {PUBLISHED}"
        ) from error
    return said


def known(ids: list[int], files: dict[int, str], path: str) -> list[int]:
    """The ids, once they are sure to be in the annotations. Raises InputError."""
    strange = [i for i in ids if i not in files]
    if strange:
        raise InputError(
            f"{len(strange)} of {len(ids)} image ids are not in '{path}': {', '.join(map(str, strange[:3]))}; ids are"
            " those of COCO val2014"
        )
    return ids


@dataclass
class CocoCaptions(Captions):
    """CHAIR on COCO val2014, as published: in a picture is what is annotated in it, and what its reference captions
    mention.

    instances, captions: `instances_val2014.json` and `captions_val2014.json`.
    images: the folder val2014.
    ids: which pictures, and in which order: null: the fixed list of 500 (see `fixed`); `opera`: the 500 of OPERA's
    released answers, in their order; or a file with ids.
    start, count: the part of that list.
    """

    instances: str
    captions: str
    images: str
    ids: str | None = None
    start: int = 0
    count: int | None = None

    @property
    def title(self) -> str:
        return f"COCO val2014, {self.ids or 'the fixed list'}"

    def items(self) -> list[Item]:
        files, objects = instances(self.instances)
        chosen = reading.part(
            known(listed(self.ids), files, self.instances) if self.ids else fixed(files),
            self.start,
            self.count,
            "pictures in the list",
        )
        said = captioned(self.captions)
        paths = reading.pictures(self.images, [files[i] for i in chosen], "COCO's val2014 pictures", PUBLISHED)
        return [Item(str(i), sorted({*objects[i], *said.get(i, ())}), paths[files[i]]) for i in chosen]

    def export(self, rows, folder: Path) -> list[Path]:
        """`chair.jsonl` with `image_id` and `caption`, as the scripts of CHAIR that OPERA and others use take it."""
        return [
            reading.write_lines(
                folder / "chair.jsonl", ({"image_id": int(row["image"]), "caption": row["caption"]} for row in rows)
            )
        ]


@dataclass
class CocoPope(YesNo):
    """POPE's questions made anew on COCO val2014, for any kind of probes; the published questions are read by
    `PopeFile`.

    In a picture is what is annotated in it, as in POPE. What is frequent and what stands together is counted over all
    annotated pictures, where the official script counts over the 500 it asks about; which of a picture's categories are
    asked about is drawn, where it takes the first. Pictures with fewer than `per_image` categories are left out.

    instances: `instances_val2014.json`.
    images: the folder val2014.
    ids: as in `CocoCaptions`; the fixed list is drawn from pictures with enough categories.
    probes: `random`, `popular` or `adversarial`.
    start, count: the part of the pictures.
    """

    instances: str
    images: str
    ids: str | None = None
    probes: str = "adversarial"
    start: int = 0
    count: int | None = None
    per_image: int = 3

    @property
    def title(self) -> str:
        return f"POPE, {self.probes}, on COCO val2014, {self.ids or 'the fixed list'}"

    def items(self) -> list[Item]:
        if self.probes not in pope.SPLITS:
            raise InputError(choices(self.probes, pope.SPLITS, "kind of probes"))
        files, objects = instances(self.instances)
        enough = [i for i, names in objects.items() if len(names) >= self.per_image]
        if self.ids:
            asked = set(enough)
            chosen = [i for i in known(listed(self.ids), files, self.instances) if i in asked]
        else:
            chosen = fixed(enough)
        made = pope.probes(
            {str(i): objects[i] for i in chosen},
            self.probes,
            self.per_image,
            counted={str(i): names for i, names in objects.items()},
        )
        wanted = {
            str(i): i
            for i in reading.part(chosen, self.start, self.count, f"pictures with {self.per_image} categories or more")
        }
        paths = reading.pictures(self.images, [files[i] for i in wanted.values()], "COCO's val2014 pictures", PUBLISHED)
        return [
            probe_item(p, objects[wanted[p.image]], paths[files[wanted[p.image]]], question(p.name))
            for p in made
            if p.image in wanted
        ]


def question(name: str) -> str:
    """POPE's question about a category, with the right article."""
    return f"Is there {words.with_article(name)} in the image?"
