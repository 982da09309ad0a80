"""Images of the user's own: described, not scored."""

from __future__ import annotations

import mimetypes
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..inputs.errors import InputError
from .base import Captions, Item

_FOLDERS = ("subfolder", "subfolders")


def is_image(file: Path) -> bool:
    """Whether a file is an image of pixels by its name or by its content; drawings such as svg are not.

    A file whose name says so and whose content does not is one: it is broken, and whoever opens it is told.
    """
    kind = mimetypes.guess_type(file.name)[0] or ""
    if kind.startswith("image/") and not kind.startswith("image/svg"):
        return True
    try:
        with Image.open(file):
            return True
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return False


@dataclass
class Files(Captions):
    """An image, or the images of a folder, in the order of names.

    Args:
        path: of the image or the folder.
        recursive: whether the images of its subfolders count, too; their ids are their paths in the folder.
    """

    path: str
    recursive: bool = False

    @property
    def title(self) -> str:
        return self.path

    def _files(self) -> tuple[list[Path], list[Path]]:
        """The images, and what else is there and is left out."""
        place = Path(self.path).expanduser()
        if not place.exists():
            raise InputError(f"no such image or folder: '{self.path}'")
        if place.is_file():
            return [place], []
        found = sorted(place.rglob("*") if self.recursive else place.iterdir())
        images = [p for p in found if p.is_file() and not p.name.startswith(".") and is_image(p)]
        others = [p for p in found if p not in set(images) and not (self.recursive and p.is_dir())]
        return images, others

    def items(self) -> list[Item]:
        images, others = self._files()
        if not images:
            what = f"holds no image, but {self._named(others)}" if others else "is empty"
            raise InputError(
                f"the folder '{self.path}' {what}; put images (png, jpg, webp, ...) into it, or, where they are in"
                " subfolders, set images_recursive=true"
            )
        place = Path(self.path).expanduser()
        ids = [place.name] if place.is_file() else [file.relative_to(place).as_posix() for file in images]
        return [Item(name, None, file) for name, file in zip(ids, images, strict=True)]

    def left_out(self) -> str | None:
        """A line on what is no image and so is left out, or None."""
        _, others = self._files()
        if not others:
            return None
        folders = sum(p.is_dir() for p in others)
        hint = "; images_recursive=true reads subfolders" if folders else ""
        return f"{self.path}: left out {self._named(others)}{hint}"

    @staticmethod
    def _named(others: list[Path]) -> str:
        files = [p.name for p in others if not p.is_dir()]
        folders = [p.name for p in others if p.is_dir()]
        counts = []
        for names, one, many in ((files, "file that is no image", "files that are no images"), (folders, *_FOLDERS)):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                counts.append(f"{len(names)} {one if len(names) == 1 else many} ({shown})")
        return " and ".join(counts)

    def first(self) -> Image.Image:
        """The first picture that can be read."""
        why = []
        for item in self.items():
            try:
                return item.open()
            except OSError as error:
                why.append(f"{item.id}: {error}")
        raise InputError(f"no picture of '{self.path}' can be read ({why[0]})")
