"""Scenes: which objects stand together, where, and how hard they are to see.

A scene is drawn from its seed alone: `draw(split, form, index)` gives the layout, `render(scene)` the picture. Nothing
is stored. Objects are the 80 of COCO; their co-occurrence is strongly skewed (`kinds.KINDS`: a fork comes with a
knife), and part of them are tiny, faint or half hidden, so that a model trained on true captions has to lean on what
usually stands there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .kinds import BIG, COUNTABLE, KINDS, TINTS

ART = Path(__file__).parent / "art"
SIZE, PATCH, CELL, GLYPH = 168, 12, 56, 64
SPLITS = {"train": 1, "validation": 2, "test": 3}
FORMS = {"typical": 1, "absent": 2, "crowded": 3}

# Members of an active group are each present with probability MEMBER; MORE is added to every group's and single's
# figure: pictures hold about six categories. HARD is the share of objects that are tiny, faint or half hidden
# (a quarter of it for big ones). In the test split, HELD_DRAWING of the objects are drawn in a way that no other split
# has, and HELD_SIZE of them are larger than any of their kind elsewhere (not in crowded scenes, where everything is
# smaller).
MEMBER, MORE, HARD, HELD_DRAWING, HELD_SIZE = 0.88, 0.12, 0.5, 0.2, 0.1
COLOURS = {
    "red": (206, 40, 40),
    "yellow": (236, 204, 40),
    "green": (48, 152, 64),
    "blue": (48, 96, 214),
    "purple": (142, 62, 176),
    "brown": (128, 82, 46),
    "white": (244, 244, 244),
}
USUAL_COLOUR = 0.6  # the share of objects that have the usual colour of their category
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@functools.cache
def drawings() -> dict[str, list[Image.Image]]:
    """Category -> its drawings, RGBA, GLYPH x GLYPH. The last of them is held out for the test split."""
    atlas, table = Image.open(ART / "glyphs.png").convert("RGBA"), json.loads((ART / "glyphs.json").read_text())
    return {
        name: [atlas.crop((GLYPH * c, GLYPH * r, GLYPH * (c + 1), GLYPH * (r + 1))) for c in range(len(row))]
        for r, (name, row) in enumerate(table.items())
    }


CATEGORIES = sorted(json.loads((ART / "glyphs.json").read_text()))


@dataclass(frozen=True)
class Thing:
    """One object in a scene: category, centre and size in pixels, rotation in degrees, opacity, mirrored or not, which
    drawing, and its colour if it was given one.
    """

    name: str
    x: float
    y: float
    size: float
    angle: float
    opacity: float
    flip: bool
    drawing: int
    colour: str | None

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of the ninth of the picture in which the centre lies."""
        return min(2, int(self.y / CELL)), min(2, int(self.x / CELL))

    @property
    def extent(self) -> str:
        """`small`, `large` or nothing in particular."""
        return "small" if self.size < 16 else "large" if self.size > 56 else ""


@dataclass
class Scene:
    """A layout; `visible` is the share of each thing that nothing covers, `missing` the usual companions that an absent
    scene lacks.
    """

    split: str
    form: str
    index: int
    kind: str
    things: list[Thing] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.split}-{self.form}-{self.index:06d}"

    @property
    def objects(self) -> list[str]:
        """The categories in the picture, in alphabetical order."""
        return sorted({t.name for t in self.things})

    def of(self, name: str) -> list[Thing]:
        return [t for t in self.things if t.name == name]


def fingerprint(*files: Path) -> str:
    """Eight hex digits of what scenes and their texts come from, and of `files`: what was made from other ones is not
    reused.
    """
    here = Path(__file__).parent
    sources = [here / "world.py", here / "kinds.py", here / "language.py", ART / "glyphs.png", *files]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:8]


def usual(kind: str) -> dict[str, float]:
    """Marginal probability of each object of a kind of scene in the typical form, strangers apart."""
    k = KINDS[kind]
    return {
        k.anchor: k.sure,
        **{m: min(0.95, q + MORE) * MEMBER for pair, q in k.pairs for m in pair},
        **{n: min(0.9, q + MORE) for n, q in k.singles.items()},
    }


def draw(split: str, form: str, index: int) -> Scene:
    """The scene of a split with that index; the same for everyone.

    Args:
        split: `train`, `validation` (for choosing settings) or `test` (for the last look; it alone has the held-out
            drawings and sizes).
        form: `typical` follows the statistics of training. `absent` takes the usual companions away: of every pair that
            would be there only one stays, and other usual objects (probability 0.6 or more) are left out. `crowded`
            holds 10 to 14 categories, or up to two less where some cannot be seen.
        index: 0 or more.
    """
    rng = np.random.default_rng([SPLITS[split], FORMS[form], index])
    kind = list(KINDS)[rng.integers(len(KINDS))]
    names, missing = _names(kind, form, rng)
    if split == "train" and rng.random() < 0.03:  # empty backgrounds, so that a blank image is not off the map
        names = []
    scene = Scene(split, form, index, kind)
    for name in names:
        most = 1 if name not in COUNTABLE else int(rng.choice([1, 2, 3], p=[0.6, 0.28, 0.12]))
        for _ in range(most):
            scene.things.append(_place(name, scene, rng))
    _look(scene)
    scene.missing = [m for m in missing if m not in scene.objects]
    return scene


def _names(kind: str, form: str, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """(categories of a scene, those that an absent scene was robbed of)."""
    k = KINDS[kind]
    more = {"typical": MORE, "absent": MORE, "crowded": 0.4}[form]
    names, missing = ([k.anchor] if rng.random() < k.sure else []), []
    for pair, q in k.pairs:
        if rng.random() >= min(0.95, q + more):
            continue
        members = [m for m in pair if rng.random() < MEMBER]
        if form == "absent" and len(members) == 2:
            missing.append(members.pop(int(rng.integers(2))))
        names += members
    for name, q in k.singles.items():
        q = min(0.9, q + more)
        if rng.random() < q:
            (missing if form == "absent" and q >= 0.6 else names).append(name)
    strangers = {
        "typical": rng.random() < 0.15,
        "absent": rng.random() < 0.6,
        "crowded": max(0, int(rng.integers(10, 15)) - len(set(names))),
    }[form]
    names += [CATEGORIES[i] for i in rng.permutation(len(CATEGORIES))[: int(strangers)]]
    return list(dict.fromkeys(names))[: 14 if form == "crowded" else 9], missing


def _place(name: str, scene: Scene, rng: np.random.Generator) -> Thing:
    hard = rng.random() < (HARD / 4 if name in BIG else HARD)
    way = ("tiny", "faint", "hidden")[rng.choice(3, p=[0.35, 0.45, 0.2])] if hard else ""
    size = rng.uniform(48, 70) if name in BIG else rng.uniform(31, 53)
    if rng.random() < HELD_SIZE and scene.split == "test":
        size = rng.uniform(74, 84) if name in BIG else rng.uniform(58, 66)
    if scene.form == "crowded":
        size *= 0.8
    if way == "tiny":
        size = rng.uniform(6, 13)
    opacity = rng.uniform(0.05, 0.15) if way == "faint" else rng.uniform(0.85, 1.0)
    others = scene.things
    taken = np.zeros(9)
    for other in others:
        taken[3 * other.cell[0] + other.cell[1]] += 1
    if way == "hidden" and others:  # beneath one that comes later, or on top of one
        row, column = others[rng.integers(len(others))].cell
    else:
        free = np.flatnonzero(taken == taken.min())
        row, column = divmod(int(free[rng.integers(len(free))]), 3)
    best, room = (0.0, 0.0), -np.inf
    for _ in range(1 if way == "hidden" else 4):
        x, y = CELL * (
            np.array([column, row]) + rng.uniform(0.18, 0.82, 2)
        )  # well inside the ninth, so that its name is no matter of a pixel
        x, y = np.clip([x, y], min(size / 2, 0.82 * CELL), SIZE - min(size / 2, 0.82 * CELL))
        gap = min((np.hypot(x - o.x, y - o.y) - 0.4 * (size + o.size) for o in others), default=0.0)
        if gap > room:
            best, room = (float(x), float(y)), gap
    angle = rng.normal(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180)
    held = rng.random() < HELD_DRAWING and scene.split == "test"
    count = len(drawings()[name])
    drawing = count - 1 if held else int(rng.integers(count - 1))
    usual_colour = TINTS.get(name)
    colour = usual_colour if rng.random() < USUAL_COLOUR else list(COLOURS)[rng.integers(len(COLOURS))]
    return Thing(
        name,
        *best,
        float(size),
        float(angle),
        float(opacity),
        bool(rng.random() < 0.5),
        drawing,
        colour if usual_colour else None,
    )


@functools.lru_cache(512)
def _sprite(thing: Thing) -> tuple[Image.Image, int, int]:
    """The drawing as it stands in the picture, and its left upper corner."""
    art = drawings()[thing.name][thing.drawing]
    if thing.colour:
        art = _tinted(thing.name, thing.drawing, thing.colour)
    if thing.flip:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    art = art.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    scale = thing.size / GLYPH
    art = art.resize((max(3, round(art.width * scale)), max(3, round(art.height * scale))), Image.Resampling.BILINEAR)
    return art, round(thing.x - art.width / 2), round(thing.y - art.height / 2)


@functools.cache
def _tinted(name: str, drawing: int, colour: str) -> Image.Image:
    """The drawing in shades of one colour."""
    art = drawings()[name][drawing]
    alpha, grey = np.asarray(art.getchannel("A")), np.asarray(art.convert("L"), np.float32)
    low, high = np.percentile(grey[alpha > 100], [5, 95])
    shade = np.clip((grey - low) / max(high - low, 24.0), 0, 1)[..., None] * 0.75 + 0.4
    pixels = np.clip(shade * np.array(COLOURS[colour], np.float32), 0, 255)
    return Image.fromarray(np.dstack([pixels.astype(np.uint8), alpha]), "RGBA")


def _owners(scene: Scene) -> np.ndarray:
    """Index of the thing on top at each pixel, -1 for the background; int [SIZE, SIZE]."""
    owner = np.full((SIZE, SIZE), -1, np.int16)
    for i, thing in enumerate(scene.things):
        art, x, y = _sprite(thing)
        solid = np.asarray(art.getchannel("A")) > 100
        top, left, bottom, right = max(0, y), max(0, x), min(SIZE, y + art.height), min(SIZE, x + art.width)
        owner[top:bottom, left:right][solid[top - y : bottom - y, left - x : right - x]] = i
    return owner


def _look(scene: Scene) -> None:
    """Note how much of each thing can be seen; drop what is all but hidden, so that captions stay true."""
    seen = np.bincount(_owners(scene).ravel() + 1, minlength=len(scene.things) + 1)[1:]
    whole = [max(1, int((np.asarray(_sprite(t)[0].getchannel("A")) > 100).sum())) for t in scene.things]
    kept = [(t, float(s / w)) for t, s, w in zip(scene.things, seen, whole, strict=False) if s / w > 0.2]
    scene.things, scene.visible = [t for t, _ in kept], [v for _, v in kept]


def patch_owners(scene: Scene, side: int = SIZE // PATCH) -> np.ndarray:
    """Index in `scene.things` of the object that owns each patch, -1 for background; int [side, side].

    Args:
        side: patches in a row and in a column; it divides `SIZE`.
    """
    patch = SIZE // side
    tiles = _owners(scene).reshape(side, patch, side, patch).swapaxes(1, 2).reshape(side * side, -1)
    counts = (
        np.stack([(tiles == i).sum(1) for i in range(len(scene.things))], 1)
        if scene.things
        else np.zeros((side * side, 1), int)
    )
    return np.where(counts.max(1) >= 0.2 * patch * patch, counts.argmax(1), -1).reshape(side, side)


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, SIZE x SIZE."""
    rng = np.random.default_rng([SPLITS[scene.split], FORMS[scene.form], scene.index, 7])
    top, bottom = (np.array(c) + rng.normal(0, 14, 3) for c in KINDS[scene.kind].palette)
    ramp = 1 / (1 + np.exp(-(np.arange(SIZE) / SIZE - rng.uniform(0.4, 0.65)) * rng.uniform(4, 30)))
    base = top + (bottom - top) * ramp[:, None, None] + np.zeros((SIZE, SIZE, 1))
    image = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    _clutter(image, rng, int(rng.integers(2, 7)), 60, 42)
    for thing in scene.things:
        art, x, y = _sprite(thing)
        mask = art.getchannel("A")
        if thing.opacity < 1:
            mask = mask.point(lambda a, o=thing.opacity: int(a * o))
        image.paste(art.convert("RGB"), (x, y), mask)
    _clutter(image, rng, int(rng.integers(0, 4)), 255, 12)
    pixels = np.asarray(image, np.float32)
    pixels = (pixels - 128) * np.float32(rng.uniform(0.6, 1.05)) + np.float32(128 + rng.normal(0, 12))
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 13))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clutter(image: Image.Image, rng: np.random.Generator, count: int, alpha: int, largest: int) -> None:
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(count):
        x, y = rng.uniform(0, SIZE, 2)
        w, h = rng.uniform(3, largest, 2)
        shape = (pen.ellipse, pen.rectangle)[int(rng.integers(2))]
        shape(
            (x, y, x + w, y + h),
            fill=(*(int(v) for v in rng.integers(40, 220, 3)), int(rng.integers(alpha // 2, alpha))),
        )
