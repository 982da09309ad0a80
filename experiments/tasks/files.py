"""Someone's own pictures: described, not scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError
from .base import Captions, Item


@dataclass
class Files(Captions):
    """An image, or every file of a folder, in the order of names."""

    path: str

    @property
    def title(self) -> str:
        return self.path

    def items(self) -> list[Item]:
        place = Path(self.path).expanduser()
        if not place.exists():
            raise InputError(f"no such image or folder: '{self.path}'")
        found = (
            [place]
            if place.is_file()
            else sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith("."))
        )
        if not found:
            raise InputError(f"the folder '{self.path}' is empty; put images (png, jpg, webp, ...) into it")
        return [Item(file.name, None, file) for file in found]

    def first(self) -> Image.Image:
        """The first picture that can be read."""
        why = []
        for item in self.items():
            try:
                return item.open()
            except OSError as error:
                why.append(f"{item.id}: {error}")
        raise InputError(f"no picture of '{self.path}' can be read ({why[0]})")
