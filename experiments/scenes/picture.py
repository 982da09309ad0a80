"""Write one scene as a picture: `python -m experiments.scenes.picture --out scene.png`, which `image=scene.png` of
run.py then takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..inputs.errors import InputError, say
from . import world


def write(scene: world.Scene, out: Path) -> None:
    """Render a scene into a file, in the form that its name ends in.

    Raises:
        InputError: for an ending that is no kind of picture, or a place that cannot be written to.
    """
    known = Image.registered_extensions()
    if known.get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--out is a picture, FILE.png or FILE.jpg, not '{out}'")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        world.render(scene).save(out)
    except OSError as error:
        raise InputError(f"cannot write '{out}' ({error.strerror or error}); choose another: --out FILE.png") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scenes.picture", description="Write one scene of the embedded model as a picture."
    )
    parser.add_argument("--split", choices=list(world.SPLITS), default="validation")
    parser.add_argument("--form", choices=list(world.FORMS), default="typical")
    parser.add_argument("--index", type=int, default=0, help="the number of the scene, 0 or more")
    parser.add_argument("--out", type=Path, required=True, help="the file: scene.png")
    args = parser.parse_args(argv)
    if args.index < 0:
        return say(InputError(f"--index is an integer >= 0, not {args.index}"))
    scene = world.draw(args.split, args.form, args.index)
    try:
        write(scene, args.out)
    except InputError as error:
        return say(error)
    print(f"{args.out}: {scene.id}, with {', '.join(scene.objects) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
