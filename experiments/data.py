"""What is described: scenes of a split, or someone's own images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from decoders.errors import choices

from .errors import InputError
from .scenes import world


@dataclass
class Item:
    """One picture; `objects` are the COCO categories in it, or None where nobody knows."""

    id: str
    objects: list[str] | None
    source: world.Scene | Path

    def open(self) -> Image.Image:
        """The picture in RGB. Raises OSError for a file that cannot be read."""
        if isinstance(self.source, world.Scene):
            return world.render(self.source)
        try:
            with Image.open(self.source) as file:
                return flat(ImageOps.exif_transpose(file))
        except Exception as error:  # Pillow's readers raise many kinds for broken files
            raise OSError(f"no readable image: {error}") from error


def flat(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip to white
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scenes(split: str, form: str, start: int, count: int) -> Iterator[Item]:
    """Scenes of a split (`train`, `validation`, `test`) in one form (`typical`, `absent`, `crowded`)."""
    for kind, given, valid in (("split", split, world.SPLITS), ("form", form, world.FORMS)):
        if given not in valid:
            raise InputError(choices(given, valid, f"{kind} of scenes"))
    if start < 0 or count < 1:
        raise InputError(f"scenes are counted from 0, and at least one is needed, not {count} from {start} on")
    for index in range(start, start + count):
        scene = world.draw(split, form, index)
        yield Item(scene.id, scene.objects, scene)


def files(path: str) -> Iterator[Item]:
    """An image, or every file of a folder, in the order of names."""
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"no such image or folder: '{path}'")
    found = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith("."))
    if not found:
        raise InputError(f"the folder '{path}' is empty; put images (png, jpg, webp, ...) into it")
    for file in found:
        yield Item(file.name, None, file)


def first(path: str) -> Image.Image:
    """The first picture of a folder, or the one of a file, that can be read."""
    why = []
    for item in files(path):
        try:
            return item.open()
        except OSError as error:
            why.append(f"{item.id}: {error}")
    raise InputError(f"no picture of '{path}' can be read ({why[0]})")
