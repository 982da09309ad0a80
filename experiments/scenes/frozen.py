"""The scenes on which results are reported, fixed: `python -m experiments.scenes.frozen` renders them all and compares.

`frozen.json` holds eight hex digits a scene, of its pixels and of the categories in it, for the first 1000 scenes of
the validation and the test split in each form. Who gets other digits (another Pillow or NumPy that draws differently)
scores other pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import world

FILE = Path(__file__).with_name("frozen.json")
COUNT, DIGITS = 1000, 8
SETS = [(split, form) for split in ("validation", "test") for form in world.FORMS]


def digest(key: tuple[str, str, int]) -> str:
    """Of the scene with that split, form and index."""
    scene = world.draw(*key)
    return hashlib.sha256(world.render(scene).tobytes() + json.dumps(scene.objects).encode()).hexdigest()[:DIGITS]


def fixed() -> dict[tuple[str, str, int], str]:
    """(split, form, index) -> digits, as they are in the file."""
    table = json.loads(FILE.read_text())
    return {
        (split, form, i): table[f"{split}-{form}"][i * DIGITS : (i + 1) * DIGITS]
        for split, form in SETS
        for i in range(COUNT)
    }


def changed(keys: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Ids of the scenes that are drawn otherwise here."""
    known = fixed()
    for key in keys:
        if digest(key) != known[key]:
            yield world.draw(*key).id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="fix them anew; older results then are of other scenes")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    keys = [(split, form, i) for split, form in SETS for i in range(COUNT)]
    with Pool(args.processes) as pool:
        found = dict(
            zip(
                keys,
                track(pool.imap(digest, keys, 50), "rendering", len(keys), console=Console(stderr=True)),
                strict=False,
            )
        )
    if args.write:
        FILE.write_text(
            json.dumps(
                {f"{split}-{form}": "".join(found[split, form, i] for i in range(COUNT)) for split, form in SETS},
                indent=1,
            )
            + "\n"
        )
        print(f"{len(found)} scenes fixed in {FILE}")
        return
    known = fixed()
    other = [key for key in keys if found[key] != known[key]]
    print(
        f"{len(keys) - len(other)} of {len(keys)} scenes are the fixed ones"
        + (f"; first that differs: {world.draw(*other[0]).id}" if other else "")
    )
    raise SystemExit(bool(other))


if __name__ == "__main__":
    main()
