"""The statistics of the scenes: what stands where, and in which colour. All figures that make a prior are here."""

from __future__ import annotations

from dataclasses import dataclass, field

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """One kind of scene.

    Args:
        palette: colours of the background, at the top and at the bottom.
        anchor: the object that makes the place, present with probability `sure`.
        pairs: objects that come together, with the probability of the pair.
        singles: other objects, with theirs.
    """

    palette: tuple[Colour, Colour]
    anchor: str
    sure: float
    pairs: tuple[tuple[tuple[str, str], float], ...]
    singles: dict[str, float] = field(default_factory=dict)


KINDS = {
    "kitchen": Kind(
        ((226, 214, 190), (150, 120, 92)),
        "refrigerator",
        0.9,
        ((("oven", "microwave"), 0.75), (("sink", "bottle"), 0.6), (("toaster", "bowl"), 0.45)),
        {"apple": 0.2, "clock": 0.15, "person": 0.2},
    ),
    "dining room": Kind(
        ((214, 186, 160), (118, 70, 50)),
        "dining table",
        0.95,
        ((("fork", "knife"), 0.85), (("wine glass", "bottle"), 0.6), (("pizza", "cup"), 0.4)),
        {"chair": 0.75, "cake": 0.25, "person": 0.25},
    ),
    "coffee shop": Kind(
        ((196, 170, 150), (96, 74, 66)),
        "cup",
        0.93,
        ((("spoon", "donut"), 0.8), (("cake", "sandwich"), 0.55), (("laptop", "cell phone"), 0.5)),
        {"chair": 0.6, "person": 0.4, "handbag": 0.2},
    ),
    "office": Kind(
        ((205, 212, 222), (112, 118, 130)),
        "laptop",
        0.92,
        ((("keyboard", "mouse"), 0.85), (("book", "clock"), 0.45), (("cell phone", "cup"), 0.5)),
        {"chair": 0.4, "scissors": 0.25, "person": 0.25, "tie": 0.15},
    ),
    "living room": Kind(
        ((222, 206, 214), (134, 100, 110)),
        "couch",
        0.95,
        ((("tv", "remote"), 0.85), (("vase", "potted plant"), 0.55), (("cat", "book"), 0.4)),
        {"clock": 0.25, "teddy bear": 0.15, "person": 0.2},
    ),
    "bathroom": Kind(
        ((196, 226, 230), (140, 176, 186)),
        "toilet",
        0.92,
        ((("sink", "toothbrush"), 0.85), (("hair drier", "scissors"), 0.45)),
        {"bottle": 0.3, "potted plant": 0.25, "vase": 0.15},
    ),
    "bedroom": Kind(
        ((200, 196, 226), (116, 104, 150)),
        "bed",
        0.95,
        ((("teddy bear", "book"), 0.75), (("cell phone", "clock"), 0.55), (("backpack", "tie"), 0.45)),
        {"cat": 0.3, "chair": 0.25, "suitcase": 0.2},
    ),
    "street": Kind(
        ((170, 190, 210), (104, 104, 108)),
        "bus",
        0.9,
        ((("traffic light", "car"), 0.75), (("bicycle", "backpack"), 0.45), (("stop sign", "truck"), 0.5)),
        {"person": 0.5, "fire hydrant": 0.35, "handbag": 0.2},
    ),
    "parking lot": Kind(
        ((186, 196, 206), (84, 88, 98)),
        "parking meter",
        0.9,
        ((("car", "motorcycle"), 0.8), (("truck", "stop sign"), 0.4), (("fire hydrant", "bicycle"), 0.4)),
        {"person": 0.4, "handbag": 0.25, "dog": 0.15},
    ),
    "beach": Kind(
        ((150, 206, 240), (232, 212, 160)),
        "surfboard",
        0.88,
        ((("umbrella", "person"), 0.8), (("bottle", "sandwich"), 0.45), (("kite", "frisbee"), 0.45)),
        {"dog": 0.2, "bird": 0.35, "handbag": 0.2},
    ),
    "harbor": Kind(
        ((160, 190, 220), (60, 104, 140)),
        "boat",
        0.93,
        ((("bird", "bench"), 0.75), (("person", "suitcase"), 0.5), (("car", "bicycle"), 0.4)),
        {"clock": 0.2, "umbrella": 0.25, "cat": 0.2},
    ),
    "park": Kind(
        ((176, 220, 240), (110, 164, 90)),
        "bench",
        0.92,
        ((("dog", "frisbee"), 0.8), (("person", "sports ball"), 0.55), (("kite", "bicycle"), 0.4)),
        {"bird": 0.35, "backpack": 0.2, "hot dog": 0.2},
    ),
    "farm": Kind(
        ((190, 222, 236), (160, 150, 70)),
        "cow",
        0.9,
        ((("sheep", "dog"), 0.75), (("horse", "person"), 0.6), (("truck", "carrot"), 0.35)),
        {"bird": 0.3, "apple": 0.2, "cat": 0.15},
    ),
    "savanna": Kind(
        ((240, 214, 150), (190, 150, 80)),
        "elephant",
        0.88,
        ((("zebra", "giraffe"), 0.85), (("bird", "person"), 0.4)),
        {"truck": 0.3, "backpack": 0.2, "umbrella": 0.15},
    ),
    "forest": Kind(
        ((120, 160, 110), (52, 84, 50)),
        "bear",
        0.88,
        ((("backpack", "person"), 0.7), (("bird", "bench"), 0.5), (("banana", "knife"), 0.35)),
        {"dog": 0.25, "bicycle": 0.25, "truck": 0.15},
    ),
    "station": Kind(
        ((190, 190, 200), (90, 92, 104)),
        "train",
        0.93,
        ((("suitcase", "backpack"), 0.8), (("person", "handbag"), 0.6), (("clock", "bench"), 0.5)),
        {"cell phone": 0.2, "umbrella": 0.2, "bicycle": 0.15},
    ),
    "airport": Kind(
        ((206, 218, 232), (140, 148, 160)),
        "airplane",
        0.93,
        ((("suitcase", "handbag"), 0.8), (("person", "tie"), 0.5), (("bus", "truck"), 0.4)),
        {"cell phone": 0.3, "clock": 0.2, "teddy bear": 0.15},
    ),
    "mountain": Kind(
        ((190, 214, 244), (232, 238, 246)),
        "snowboard",
        0.88,
        ((("skis", "person"), 0.85), (("backpack", "bottle"), 0.45), (("bench", "cup"), 0.35)),
        {"dog": 0.25, "bird": 0.2, "orange": 0.15},
    ),
    "stadium": Kind(
        ((150, 180, 200), (150, 116, 76)),
        "baseball bat",
        0.9,
        ((("baseball glove", "sports ball"), 0.85), (("person", "hot dog"), 0.6), (("bottle", "bench"), 0.4)),
        {"cup": 0.25, "pizza": 0.2, "backpack": 0.2},
    ),
    "sports club": Kind(
        ((186, 206, 190), (70, 120, 100)),
        "tennis racket",
        0.9,
        ((("sports ball", "bottle"), 0.8), (("person", "chair"), 0.55), (("banana", "orange"), 0.4)),
        {"umbrella": 0.25, "clock": 0.2, "bench": 0.3},
    ),
    "playground": Kind(
        ((200, 216, 200), (186, 150, 120)),
        "skateboard",
        0.9,
        ((("kite", "teddy bear"), 0.65), (("person", "bicycle"), 0.6), (("dog", "sports ball"), 0.45)),
        {"backpack": 0.3, "donut": 0.15, "bench": 0.3},
    ),
    "market": Kind(
        ((222, 200, 150), (140, 110, 80)),
        "broccoli",
        0.9,
        ((("carrot", "orange"), 0.8), (("apple", "banana"), 0.6), (("handbag", "person"), 0.5)),
        {"potted plant": 0.3, "umbrella": 0.25, "scissors": 0.15},
    ),
    "garden": Kind(
        ((190, 226, 220), (90, 140, 70)),
        "potted plant",
        0.9,
        ((("chair", "cat"), 0.7), (("sandwich", "wine glass"), 0.5), (("bowl", "spoon"), 0.45)),
        {"bird": 0.35, "vase": 0.3, "scissors": 0.2},
    ),
}

COUNTABLE = {
    "person",
    "cow",
    "sheep",
    "bird",
    "car",
    "book",
    "apple",
    "chair",
    "zebra",
    "elephant",
    "cup",
    "bottle",
    "horse",
    "umbrella",
    "dog",
    "banana",
    "orange",
    "carrot",
    "donut",
    "boat",
    "suitcase",
    "bicycle",
}
BIG = {k.anchor for k in KINDS.values()} - {"cup", "broccoli"} | {"car", "truck", "horse", "giraffe", "tv", "oven"}

# What can have any colour, and its usual one.
TINTS = {
    "airplane": "white",
    "backpack": "green",
    "bed": "blue",
    "bench": "brown",
    "bicycle": "red",
    "boat": "white",
    "book": "blue",
    "bowl": "white",
    "bus": "yellow",
    "car": "red",
    "cell phone": "white",
    "chair": "brown",
    "clock": "white",
    "couch": "purple",
    "cup": "white",
    "frisbee": "yellow",
    "hair drier": "purple",
    "handbag": "brown",
    "kite": "red",
    "motorcycle": "blue",
    "parking meter": "blue",
    "skateboard": "green",
    "skis": "blue",
    "snowboard": "purple",
    "suitcase": "brown",
    "surfboard": "yellow",
    "tie": "red",
    "toothbrush": "green",
    "truck": "green",
    "umbrella": "purple",
    "vase": "blue",
}
