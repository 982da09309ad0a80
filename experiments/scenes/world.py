"""Scenes: which objects stand together, where, and how hard they are to see.

A scene is drawn from its seed alone: `draw(split, index)` gives the layout, `render(scene)` the picture. Nothing is
stored. Objects are those of COCO; their co-occurrence is strongly skewed (`SCENES`: a table brings forks), and part of
them are tiny, faint or half hidden, so that a model trained on true captions has to lean on what usually stands there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ART = Path(__file__).parent / "art"
SIZE, PATCH = 120, 12
SPLITS = {"train": 1, "validation": 2, "typical": 3, "absent": 4}

# scene -> (palette of the background: top, bottom), anchor, pairs (group probability), singles.
# Members of an active group are each present with probability MEMBER.
# MORE is added to every group's and single's figure: pictures hold about six categories.
# HARD is the share of objects that are tiny, faint or half hidden (a quarter of it for big ones).
MEMBER, MORE, HARD = 0.88, 0.12, 0.5
SCENES = {
    "kitchen": (((226, 214, 190), (150, 120, 92)), ("refrigerator", 0.9), [(("oven", "microwave"), 0.75), (("sink", "bottle"), 0.6), (("toaster", "banana"), 0.45)], {"apple": 0.2, "clock": 0.15, "person": 0.2}),
    "dining room": (((214, 186, 160), (118, 70, 50)), ("dining table", 0.95), [(("fork", "knife"), 0.85), (("wine glass", "bottle"), 0.6), (("pizza", "cup"), 0.4)], {"chair": 0.75, "cake": 0.25, "bowl": 0.3, "person": 0.25}),
    "office": (((205, 212, 222), (112, 118, 130)), ("laptop", 0.92), [(("keyboard", "mouse"), 0.85), (("book", "clock"), 0.45), (("cell phone", "cup"), 0.5)], {"chair": 0.4, "scissors": 0.2, "person": 0.25}),
    "living room": (((222, 206, 214), (134, 100, 110)), ("couch", 0.95), [(("tv", "remote"), 0.85), (("vase", "potted plant"), 0.55), (("cat", "book"), 0.4)], {"clock": 0.25, "teddy bear": 0.15, "person": 0.2}),
    "bathroom": (((196, 226, 230), (140, 176, 186)), ("toilet", 0.92), [(("sink", "toothbrush"), 0.85), (("hair drier", "scissors"), 0.45)], {"bottle": 0.3, "potted plant": 0.25, "vase": 0.15}),
    "bedroom": (((200, 196, 226), (116, 104, 150)), ("bed", 0.95), [(("teddy bear", "book"), 0.75), (("cell phone", "clock"), 0.55), (("backpack", "tie"), 0.45)], {"cat": 0.3, "chair": 0.25, "suitcase": 0.2}),
    "street": (((170, 190, 210), (104, 104, 108)), ("car", 0.92), [(("traffic light", "bus"), 0.75), (("bicycle", "backpack"), 0.45), (("stop sign", "truck"), 0.5)], {"person": 0.5, "fire hydrant": 0.35, "motorcycle": 0.3, "handbag": 0.2}),
    "beach": (((150, 206, 240), (232, 212, 160)), ("surfboard", 0.85), [(("umbrella", "person"), 0.8), (("boat", "bird"), 0.6), (("kite", "frisbee"), 0.45)], {"dog": 0.2, "handbag": 0.2}),
    "park": (((176, 220, 240), (110, 164, 90)), ("bench", 0.92), [(("dog", "frisbee"), 0.8), (("person", "sports ball"), 0.55), (("kite", "bicycle"), 0.4)], {"bird": 0.35, "backpack": 0.2, "hot dog": 0.15}),
    "farm": (((190, 222, 236), (160, 150, 70)), ("cow", 0.9), [(("sheep", "dog"), 0.75), (("horse", "person"), 0.6)], {"truck": 0.35, "bird": 0.3, "apple": 0.15}),
    "savanna": (((240, 214, 150), (190, 150, 80)), ("elephant", 0.88), [(("zebra", "giraffe"), 0.85), (("bird", "person"), 0.4)], {"truck": 0.3, "backpack": 0.15, "cow": 0.1}),
    "station": (((190, 190, 200), (90, 92, 104)), ("train", 0.93), [(("suitcase", "backpack"), 0.8), (("person", "handbag"), 0.6), (("clock", "bench"), 0.5)], {"cell phone": 0.2, "umbrella": 0.2, "bicycle": 0.15}),
}
CATEGORIES = sorted({n for _, (a, _), pairs, singles in SCENES.values() for n in [a, *[m for p, _ in pairs for m in p], *singles]})
COUNTABLE = {"person", "cow", "sheep", "bird", "car", "book", "apple", "chair", "zebra", "elephant", "cup", "bottle", "horse", "umbrella"}
BIG = {a for _, (a, _), _, _ in SCENES.values()} | {"bus", "truck", "horse", "giraffe", "tv", "oven", "boat"}


@dataclass
class Thing:
    """One object in a scene: category, centre and size in pixels, rotation in degrees, opacity, mirrored or not."""

    name: str
    x: float
    y: float
    size: float
    angle: float
    opacity: float
    flip: bool
    visible: float = 1.0

    @property
    def where(self) -> str:
        """The ninth of the picture in which the centre lies, in words."""
        column = ("left", "", "right")[min(2, int(3 * self.x / SIZE))]
        row = ("top", "", "bottom")[min(2, int(3 * self.y / SIZE))]
        return f"at the {row} {column}" if row and column else f"at the {row}" if row else f"on the {column}" if column else "in the middle"


@dataclass
class Scene:
    split: str
    index: int
    kind: str
    things: list[Thing] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{self.split}-{self.index:06d}"

    @property
    def objects(self) -> list[str]:
        return sorted({t.name for t in self.things})


@functools.cache
def _sprites() -> dict[str, Image.Image]:
    order = [entry["category"] for entry in json.loads((ART / "coco_emoji.json").read_text())]
    atlas = Image.open(ART / "coco80_atlas64.png").convert("RGBA")
    boxes = {name: (64 * (i % 10), 64 * (i // 10)) for i, name in enumerate(order)}
    return {name: atlas.crop((x, y, x + 64, y + 64)) for name, (x, y) in boxes.items()}


def fingerprint(*files: Path) -> str:
    """Eight hex digits of what scenes and their texts come from, and of `files`: what was made from other ones is not reused."""
    sources = [Path(__file__), Path(__file__).with_name("language.py"), *files]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:8]


def _rng(split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS[split], index])


def usual(kind: str) -> dict[str, float]:
    """Marginal probability of each object of a scene kind."""
    _, (anchor, p), pairs, singles = SCENES[kind]
    return {
        anchor: p,
        **{m: min(0.95, q + MORE) * MEMBER for pair, q in pairs for m in pair},
        **{n: min(0.9, q + MORE) for n, q in singles.items()},
    }


def draw(split: str, index: int) -> Scene:
    """The scene of a split with that index; the same for everyone.

    `train`, `validation` and `typical` follow the same statistics. `absent` takes the usual companions away: of every
    pair that would be there only one stays, and other usual objects (probability 0.6 or more) are left out.
    """
    rng = _rng(split, index)
    kind = list(SCENES)[rng.integers(len(SCENES))]
    _, (anchor, p), pairs, singles = SCENES[kind]
    names, missing = ([anchor] if rng.random() < p else []), []
    for pair, q in pairs:
        if rng.random() >= min(0.95, q + MORE):
            continue
        members = [m for m in pair if rng.random() < MEMBER]
        if split == "absent" and len(members) == 2:
            missing.append(members.pop(int(rng.integers(2))))
        names += members
    for name, q in singles.items():
        q = min(0.9, q + MORE)
        if rng.random() < q:
            (missing if split == "absent" and q >= 0.6 else names).append(name)
    if rng.random() < (0.6 if split == "absent" else 0.15):
        names.append(CATEGORIES[rng.integers(len(CATEGORIES))])
    if split == "train" and rng.random() < 0.03:  # empty backgrounds, so that a blank image is not off the map
        names = []
    names = list(dict.fromkeys(names))[:9]
    missing = [m for m in missing if m not in names]
    scene = Scene(split, index, kind, missing=missing)
    for name in names:
        count = 1 if name not in COUNTABLE else int(rng.choice([1, 2, 3], p=[0.72, 0.2, 0.08]))
        for _ in range(count):
            scene.things.append(_place(name, scene.things, rng))
    _look(scene)
    return scene


def _place(name: str, others: list[Thing], rng: np.random.Generator) -> Thing:
    hard = rng.random() < (HARD / 4 if name in BIG else HARD)
    way = ("tiny", "faint", "hidden")[rng.choice(3, p=[0.35, 0.45, 0.2])] if hard else ""
    size = rng.uniform(34, 52) if name in BIG else rng.uniform(22, 38)
    if way == "tiny":
        size = rng.uniform(4, 9)
    opacity = rng.uniform(0.05, 0.15) if way == "faint" else rng.uniform(0.85, 1.0)
    best, room = None, -1.0
    for _ in range(1 if way == "hidden" else 8):  # few tries: more overlap
        x, y = rng.uniform(size / 2, SIZE - size / 2, 2)
        gap = min((np.hypot(x - o.x, y - o.y) - 0.4 * (size + o.size) for o in others), default=99.0)
        if gap > room or best is None:
            best, room = (x, y), gap
    angle = rng.normal(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180)
    return Thing(name, float(best[0]), float(best[1]), float(size), float(angle), float(opacity), bool(rng.random() < 0.5))


def _sprite(thing: Thing) -> tuple[Image.Image, int, int]:
    art = _sprites()[thing.name]
    if thing.flip:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    art = art.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    scale = thing.size / 64
    art = art.resize((max(3, round(art.width * scale)), max(3, round(art.height * scale))), Image.Resampling.BILINEAR)
    return art, round(thing.x - art.width / 2), round(thing.y - art.height / 2)


def _owners(scene: Scene) -> np.ndarray:
    """Index of the thing on top at each pixel, -1 for the background."""
    owner = np.full((SIZE, SIZE), -1, np.int16)
    for i, thing in enumerate(scene.things):
        art, x, y = _sprite(thing)
        solid = np.asarray(art.getchannel("A")) > 100
        top, left, bottom, right = max(0, y), max(0, x), min(SIZE, y + art.height), min(SIZE, x + art.width)
        owner[top:bottom, left:right][solid[top - y : bottom - y, left - x : right - x]] = i
    return owner


def _look(scene: Scene) -> None:
    """Note how much of each thing can be seen; drop what is all but hidden, so that captions stay true."""
    owner = _owners(scene)
    for i, thing in enumerate(scene.things):
        art, _, _ = _sprite(thing)
        thing.visible = float((owner == i).sum() / max(1, (np.asarray(art.getchannel("A")) > 100).sum()))
    scene.things = [t for t in scene.things if t.visible > 0.2]
    present = {t.name for t in scene.things}
    scene.missing = [m for m in scene.missing if m not in present]


def patch_labels(scene: Scene) -> np.ndarray:
    """Category (index in `CATEGORIES`) that owns each patch, -1 for background; [SIZE/PATCH, SIZE/PATCH]."""
    owner, side = _owners(scene), SIZE // PATCH
    labels = np.full((side, side), -1, np.int64)
    for r in range(side):
        for c in range(side):
            ids, counts = np.unique(owner[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH], return_counts=True)
            counts = np.where(ids < 0, 0, counts)
            if counts.max() >= 0.2 * PATCH * PATCH:
                labels[r, c] = CATEGORIES.index(scene.things[ids[counts.argmax()]].name)
    return labels


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, SIZE x SIZE."""
    rng = np.random.default_rng([SPLITS[scene.split], scene.index, 7])
    top, bottom = (np.array(c) + rng.normal(0, 14, 3) for c in SCENES[scene.kind][0])
    ramp = 1 / (1 + np.exp(-(np.arange(SIZE) / SIZE - rng.uniform(0.4, 0.65)) * rng.uniform(4, 30)))
    base = top + (bottom - top) * ramp[:, None, None] + np.zeros((SIZE, SIZE, 1))
    image = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    _clutter(image, rng, int(rng.integers(2, 7)), 60)
    for thing in scene.things:
        art, x, y = _sprite(thing)
        mask = art.getchannel("A")
        if thing.opacity < 1:
            mask = mask.point(lambda a, o=thing.opacity: int(a * o))
        image.paste(art.convert("RGB"), (x, y), mask)
    _clutter(image, rng, int(rng.integers(0, 4)), 255, largest=9)
    pixels = np.asarray(image, np.float32)
    pixels = (pixels - 128) * rng.uniform(0.6, 1.05) + 128 + rng.normal(0, 12)
    pixels += rng.normal(0, rng.uniform(2, 13), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clutter(image: Image.Image, rng: np.random.Generator, count: int, alpha: int, largest: int = 30) -> None:
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(count):
        x, y = rng.uniform(0, SIZE, 2)
        w, h = rng.uniform(3, largest, 2)
        shape = (pen.ellipse, pen.rectangle)[int(rng.integers(2))]
        shape((x, y, x + w, y + h), fill=(*(int(v) for v in rng.integers(40, 220, 3)), int(rng.integers(alpha // 2, alpha))))
