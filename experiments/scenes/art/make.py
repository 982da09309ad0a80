"""Build `glyphs.png` and `glyphs.json`: `python experiments/scenes/art/make.py FOLDER`.

FOLDER holds the npm packages @iconify-json/noto, noto-v1, fluent-emoji-flat, fxemoji and mdi, unpacked:
FOLDER/noto/package/icons.json and so on. Made with their versions 1.2.9, 1.2.5, 1.2.6, 1.2.2 and 1.2.3, and `pip
install cairosvg==2.9.1`. One row a category, in the order of COCO; the last drawing of each row is held out for the
test split.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import cairosvg
from PIL import Image

CELL = 64
# n: noto, v: noto-v1, f: fluent-emoji-flat, x: fxemoji, m: mdi with a colour, o: drawn here
SETS = {"n": "noto", "v": "noto-v1", "f": "fluent-emoji-flat", "x": "fxemoji", "m": "mdi"}
ROWS = {
    "person": "n:woman n:man f:woman f:boy n:older-person v:man v:girl n:boy",
    "bicycle": "n:bicycle f:bicycle m:bicycle:#3a76c4 v:bicycle",
    "car": "n:automobile f:automobile f:sport-utility-vehicle v:automobile",
    "motorcycle": "n:motorcycle f:motorcycle m:motorbike:#c2442e v:motorcycle",
    "airplane": "n:airplane f:airplane m:airplane:#7a8fa6 v:airplane",
    "bus": "n:bus f:bus m:bus-side:#e0a020 v:bus",
    "train": "n:locomotive f:locomotive x:steamlocomotive v:locomotive",
    "truck": "n:delivery-truck f:delivery-truck m:truck:#5a8f4a v:delivery-truck",
    "boat": "n:sailboat f:sailboat m:sail-boat:#5a8fc0 v:sailboat",
    "traffic light": "n:vertical-traffic-light f:vertical-traffic-light v:vertical-traffic-light",
    "fire hydrant": "m:fire-hydrant:#d23c2e o:hydrant o:hydrant2",
    "stop sign": "n:stop-sign f:stop-sign o:stop v:stop-sign",
    "parking meter": "o:meter1 o:meter2 o:meter3",
    "bench": "m:bench-back:#8a5a2b o:bench o:bench2",
    "bird": "n:bird f:bird m:bird:#3c8ad0 v:bird",
    "cat": "n:cat f:cat x:catside v:cat",
    "dog": "n:dog-face f:dog-face x:dog v:dog-face",
    "horse": "n:horse-face f:horse-face x:horseface v:horse-face",
    "sheep": "n:ewe f:ewe x:sheep v:ewe",
    "cow": "n:cow f:cow x:cow v:cow",
    "elephant": "n:elephant f:elephant m:elephant:#8a94a0 v:elephant",
    "bear": "n:bear f:bear x:bear v:bear",
    "zebra": "n:zebra f:zebra",
    "giraffe": "n:giraffe f:giraffe",
    "backpack": "n:backpack f:backpack m:bag-personal:#c2442e v:backpack",
    "umbrella": "n:umbrella f:umbrella m:umbrella:#7a4ab0 v:umbrella",
    "handbag": "n:handbag f:handbag x:handbag v:handbag",
    "tie": "m:tie:#b02a3a o:tie o:tie2",
    "suitcase": "n:luggage f:luggage m:bag-suitcase:#8a5a2b",
    "frisbee": "n:flying-disc f:flying-disc",
    "skis": "n:skis o:skis f:skis",
    "snowboard": "o:snowboard o:snowboard2 o:snowboard3",
    "sports ball": "n:soccer-ball f:soccer-ball m:soccer:#e8e8e8 v:soccer-ball",
    "kite": "n:kite o:kite f:kite",
    "baseball bat": "m:baseball-bat:#b07a3a o:bat1 o:bat2",
    "baseball glove": "o:glove1 o:glove2 o:glove3",
    "skateboard": "n:skateboard m:skateboard:#4a8a5a f:skateboard",
    "surfboard": "o:surf1 o:surf2 o:surf3",
    "tennis racket": "m:tennis:#c2442e o:racket1 o:racket2",
    "bottle": "f:bottle-with-popping-cork m:bottle-wine:#3a7a4a n:bottle-with-popping-cork",
    "wine glass": "n:wine-glass f:wine-glass m:glass-wine:#b02a4a v:wine-glass",
    "cup": "n:hot-beverage f:hot-beverage m:coffee:#c08a5a v:hot-beverage",
    "fork": "m:silverware-fork:#9aa0a8 o:fork1 o:fork2",
    "knife": "n:kitchen-knife f:kitchen-knife v:kitchen-knife",
    "spoon": "n:spoon f:spoon m:silverware-spoon:#9aa0a8 v:spoon",
    "bowl": "n:bowl-with-spoon f:bowl-with-spoon m:bowl:#4a8ab0 o:bowl",
    "banana": "n:banana f:banana x:banana v:banana",
    "apple": "n:red-apple f:red-apple x:redapple v:red-apple",
    "sandwich": "n:sandwich f:sandwich",
    "orange": "n:tangerine f:tangerine x:tangerine v:tangerine",
    "broccoli": "n:broccoli f:broccoli",
    "carrot": "n:carrot f:carrot m:carrot:#e8801e v:carrot",
    "hot dog": "n:hot-dog f:hot-dog v:hot-dog",
    "pizza": "n:pizza f:pizza x:sliceofpizza v:pizza",
    "donut": "n:doughnut f:doughnut x:doughnut v:doughnut",
    "cake": "n:birthday-cake f:birthday-cake m:cake:#e08aa8 v:birthday-cake",
    "chair": "n:chair o:chair f:chair",
    "couch": "n:couch-and-lamp m:sofa:#7a4ab0 o:couch f:couch-and-lamp",
    "potted plant": "n:potted-plant o:plant f:potted-plant",
    "bed": "n:bed f:bed m:bed:#4a6ab0 v:bed",
    "dining table": "m:table-furniture:#8a5a2b o:table1 o:table2",
    "toilet": "n:toilet f:toilet m:toilet:#e0e4ea v:toilet",
    "tv": "n:television f:television m:television-classic:#5a5a64 v:television",
    "laptop": "n:laptop f:laptop m:laptop:#6a7a8a v:laptop",
    "mouse": "n:computer-mouse f:computer-mouse m:mouse:#b0b4bc v:computer-mouse",
    "remote": "m:remote:#4a4a54 o:remote1 o:remote2",
    "keyboard": "n:keyboard f:keyboard m:keyboard:#6a7480 v:keyboard",
    "cell phone": "n:mobile-phone f:mobile-phone m:cellphone:#3a6ab0 v:mobile-phone",
    "microwave": "m:microwave:#7a828c o:microwave1 o:microwave2",
    "oven": "m:stove:#8a929c o:oven1 o:oven2",
    "toaster": "m:toaster:#c07a4a o:toaster1 o:toaster2",
    "sink": "m:countertop:#6aa0b8 o:sink1 o:sink2",
    "refrigerator": "m:fridge:#a8b8c8 o:fridge1 m:fridge-bottom:#c8d0d8",
    "book": "n:closed-book f:closed-book m:book:#2a6ab0 v:closed-book",
    "clock": "n:three-oclock f:three-oclock x:clock3oclock m:clock:#5a5a8a v:four-oclock",
    "vase": "n:amphora o:vase f:amphora",
    "scissors": "n:scissors f:scissors x:blackscissors v:scissors",
    "teddy bear": "n:teddy-bear m:teddy-bear:#a8703a f:teddy-bear",
    "hair drier": "m:hair-dryer:#b04a8a o:drier1 o:drier2",
    "toothbrush": "n:toothbrush m:toothbrush:#3aa08a f:toothbrush",
}


def _rect(x, y, w, h, fill, r=2):
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}" fill="{fill}" stroke="#333" stroke-width="1.2"/>'


def _ellipse(x, y, a, b, fill):
    return f'<ellipse cx="{x}" cy="{y}" rx="{a}" ry="{b}" fill="{fill}" stroke="#333" stroke-width="1.2"/>'


def _path(d, fill="none", stroke="#333", width=1.4):
    return (
        f'<path d="{d}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" stroke-linecap="round"'
        ' stroke-linejoin="round"/>'
    )


def _turned(body, angle):
    return f'<g transform="rotate({angle} 32 32)">{body}</g>'


def _glove(fill, dark, spread):
    fingers = "".join(_turned(_rect(27, 4, 9, 30, fill, 5), a) for a in (-spread, -spread / 3, spread / 3, spread))
    return (
        fingers
        + _turned(_rect(6, 30, 26, 11, fill, 6), 25)
        + _ellipse(33, 40, 19, 17, fill)
        + _ellipse(32, 38, 9, 8, dark)
    )


def _racket(frame, grip, strings):
    net = "".join(
        _path(f"M{22 + 5 * i} 6V38", stroke=strings, width=0.8)
        + _path(f"M16 {9 + 5 * i}H48", stroke=strings, width=0.8)
        for i in range(6)
    )
    clip = f'<clipPath id="c"><ellipse cx="32" cy="21" rx="14" ry="17"/></clipPath><g clip-path="url(#c)">{net}</g>'
    return _turned(
        clip
        + f'<ellipse cx="32" cy="21" rx="14" ry="17" fill="none" stroke="{frame}" stroke-width="3.6"/>'
        + _path("M27 36L31 44M37 36L33 44", stroke=frame, width=3)
        + _rect(29.5, 43, 5, 18, grip),
        40,
    )


OWN = {
    "hydrant": _rect(20, 24, 24, 32, "#d84a30", 3)
    + _path("M20 24Q32 4 44 24Z", "#d84a30")
    + _rect(15, 54, 34, 6, "#b03a24")
    + _rect(12, 32, 9, 10, "#e8b030")
    + _rect(43, 32, 9, 10, "#e8b030")
    + _ellipse(32, 38, 6, 6, "#e8b030"),
    "stop": '<polygon points="22,5 42,5 59,22 59,42 42,59 22,59 5,42 5,22" fill="#c8202c" stroke="#eee"'
    ' stroke-width="3"/>' + _rect(15, 27, 34, 10, "#f4f4f4", 1),
    "meter1": _rect(29, 34, 6, 28, "#6a7078")
    + _path("M18 36V18Q18 4 32 4Q46 4 46 18V36Z", "#4a70a8")
    + _path("M23 20Q23 10 32 10Q41 10 41 20Z", "#dce8f0")
    + _rect(28, 26, 8, 3, "#222", 1),
    "meter2": _rect(29.5, 36, 5, 26, "#50545a")
    + _rect(19, 10, 26, 27, "#3c62a0", 6)
    + _ellipse(32, 20, 9, 7, "#e4ecf2")
    + _path("M32 20L37 16")
    + _rect(27, 30, 10, 3, "#222", 1)
    + _rect(22, 58, 20, 4, "#50545a"),
    "meter3": _rect(29, 36, 6, 26, "#70767c")
    + _path("M19 38V20Q19 3 32 3Q45 3 45 20V38Z", "#587cae")
    + _rect(24, 13, 16, 9, "#e8eef2", 1)
    + _ellipse(32, 30, 3, 3, "#f0c040"),
    "bench": "".join(_rect(6, y, 52, 5, "#96622e", 1) for y in (16, 24, 36))
    + _rect(10, 14, 4, 42, "#5a4a40", 1)
    + _rect(50, 14, 4, 42, "#5a4a40", 1),
    "hydrant2": _rect(22, 20, 20, 40, "#c83c28", 2)
    + _path("M20 22Q22 8 32 6Q42 8 44 22Z", "#b03020")
    + _rect(29, 2, 6, 6, "#e8b030")
    + _rect(14, 30, 10, 8, "#b03020")
    + _rect(40, 30, 10, 8, "#b03020")
    + _ellipse(32, 34, 5, 5, "#f0f0f0")
    + _rect(17, 56, 30, 6, "#8a2818"),
    "bench2": "".join(_rect(7, y, 50, 4.4, "#a06c34", 1) for y in (13, 20, 27))
    + _rect(3, 38, 58, 6, "#8a5a2b", 1)
    + "".join(_rect(x, y, 4, h, "#444", 1) for x in (11, 49) for y, h in ((11, 20), (44, 14)))
    + _rect(11, 30, 3, 9, "#444", 1)
    + _rect(50, 30, 3, 9, "#444", 1),
    "tie2": _path("M25 3H39L37 13L41 44L32 61L23 44L27 13Z", "#7a3ca0")
    + "".join(
        _ellipse(x, y, 1.6, 1.6, "#f0e0f8") for x, y in ((32, 22), (29, 31), (35, 31), (32, 40), (29, 48), (35, 48))
    )
    + _path("M27 13H37"),
    "tie": _path("M26 4H38L36 14L43 46L32 60L21 46L28 14Z", "#a8324a")
    + _path("M27 22L38 32M25 34L40 46", stroke="#e8c8d0", width=2.4)
    + _path("M28 14H36"),
    "skis": "".join(
        _turned(_path(f"M{x} 58V10Q{x} 3 {x + 4} 5V58Z", "#3c82c8"), 14) + _turned(_rect(x - 1, 34, 6, 8, "#333"), 14)
        for x in (22, 36)
    ),
    "snowboard": _turned(
        _rect(23, 3, 18, 58, "#7a4ab8", 9) + _rect(24, 17, 16, 6, "#333") + _rect(24, 41, 16, 6, "#333"), 32
    ),
    "snowboard2": _turned(
        _rect(22, 2, 20, 60, "#d08a2a", 10)
        + _path("M32 8V56", stroke="#fff", width=3)
        + _rect(23, 18, 18, 5, "#444")
        + _rect(23, 42, 18, 5, "#444"),
        45,
    ),
    "snowboard3": _turned(
        _rect(23, 2, 18, 60, "#3aa08a", 9)
        + _path("M24 10H40M24 54H40", stroke="#f0e060", width=3)
        + _rect(21, 17, 22, 6, "#222", 3)
        + _rect(21, 41, 22, 6, "#222", 3),
        22,
    ),
    "kite": _path("M36 4L56 24L30 44L16 20Z", "#e04848")
    + _path("M36 4L30 44L16 20L56 24Z", "#f0b838")
    + _path("M30 44Q20 50 26 54T18 61", stroke="#4a6ac0", width=2.2),
    "bat1": _turned(_path("M28 4Q32 1 36 4L38 26L34.5 56H29.5L26 26Z", "#c08a4a") + _rect(28, 55, 8, 5, "#6a4424"), 38),
    "bat2": _turned(
        _path("M27 3Q32 -1 37 3L38 30L34 57H30L26 30Z", "#a86e34")
        + _rect(30, 40, 4, 16, "#333", 1)
        + _rect(28, 56, 8, 4, "#a86e34"),
        45,
    ),
    "glove1": _glove("#9a5a2a", "#6e3c18", 42),
    "glove2": _glove("#b06c34", "#7c4820", 36),
    "glove3": _glove("#8c5226", "#b88850", 46),
    "surf1": _turned(
        _path("M32 2Q46 18 42 48Q40 60 32 62Q24 60 22 48Q18 18 32 2Z", "#f0c848")
        + _path("M32 4V60", stroke="#c84a3a", width=2.4),
        25,
    ),
    "surf2": _turned(
        _path("M32 2Q44 22 41 50Q38 61 32 62Q26 61 23 50Q20 22 32 2Z", "#e8e4d8")
        + _path("M24 24H40M23 32H41", stroke="#3a8ac0", width=3.4),
        32,
    ),
    "surf3": _turned(
        _path("M32 2Q47 20 42 50Q39 61 32 62Q25 61 22 50Q17 20 32 2Z", "#e8b03c")
        + _path("M23 40Q32 30 41 40", stroke="#c8503c", width=3.4)
        + _path("M32 4V60", stroke="#8a5a2a"),
        20,
    ),
    "racket1": _racket("#c8402e", "#333", "#eee"),
    "racket2": _racket("#3a62b0", "#5a4030", "#f4f0d8"),
    "fork1": _turned(
        "".join(_rect(x, 4, 3.4, 20, "#a8aeb6", 1.5) for x in (22, 30.3, 38.6))
        + _path("M22 21H42Q42 34 34.5 36V58Q32 62 29.5 58V36Q22 34 22 21Z", "#a8aeb6"),
        12,
    ),
    "fork2": _turned(
        "".join(_rect(x, 3, 2.8, 20, "#c0c4ca", 1.4) for x in (21.5, 27.6, 33.6, 39.7))
        + _path("M21.5 20H42.5Q42 33 35 35L35.5 56Q32 63 28.5 56L29 35Q22 33 21.5 20Z", "#c0c4ca"),
        -10,
    ),
    "bowl": _path("M5 28H59Q58 52 38 56V59H26V56Q6 52 5 28Z", "#5a92c0") + _ellipse(32, 28, 27, 6, "#e8eef2"),
    "chair": _path("M16 4H22V34H46V60H41V42H21V60H16Z", "#8a5a2e")
    + _rect(16, 33, 31, 6, "#a8723e")
    + _rect(17, 8, 4, 20, "#a8723e", 1),
    "couch": _rect(9, 18, 46, 22, "#8a52b0", 6)
    + _rect(4, 27, 12, 24, "#7a44a0", 6)
    + _rect(48, 27, 12, 24, "#7a44a0", 6)
    + _rect(15, 35, 34, 14, "#9a66c0", 3)
    + _rect(10, 51, 4, 6, "#444", 1)
    + _rect(50, 51, 4, 6, "#444", 1),
    "plant": _path("M20 40H44L40 61H24Z", "#b8683a")
    + "".join(_turned(_path("M32 40Q22 22 32 3Q42 22 32 40Z", "#3f9a4a"), a) for a in (-38, 38, 0)),
    "table1": _rect(3, 18, 58, 7, "#96622e") + _rect(9, 25, 6, 31, "#7c4e22", 1) + _rect(49, 25, 6, 31, "#7c4e22", 1),
    "table2": _path("M12 18H52L61 28H3Z", "#a87040")
    + _rect(3, 28, 58, 5, "#8c5a2c", 1)
    + _rect(7, 33, 5, 25, "#7c4e22", 1)
    + _rect(52, 33, 5, 25, "#7c4e22", 1),
    "remote1": _turned(
        _rect(23, 3, 18, 58, "#44464e", 5)
        + _ellipse(32, 13, 4, 4, "#d84040")
        + "".join(_rect(x, y, 4, 3.4, "#c8ccd4", 1) for x in (26, 34) for y in (23, 30, 37, 44, 51)),
        24,
    ),
    "remote2": _turned(
        _rect(22, 3, 20, 58, "#363840", 7)
        + _ellipse(32, 24, 7, 7, "#a8aeb8")
        + _ellipse(28, 10, 2.4, 2.4, "#d84040")
        + "".join(_rect(x, y, 4, 4, "#a8aeb8", 2) for x in (26, 34) for y in (38, 46)),
        16,
    ),
    "microwave1": _rect(3, 14, 58, 36, "#8a929c", 3)
    + _rect(8, 19, 34, 26, "#2c3038", 2)
    + "".join(_rect(x, y, 4, 4, "#e0e4ea", 1) for x in (47, 53) for y in (22, 29, 36)),
    "microwave2": _rect(3, 13, 58, 38, "#b0b6be", 4)
    + _rect(7, 18, 36, 28, "#3a3e48", 4)
    + _rect(40, 20, 2.4, 24, "#e4e8ec", 1)
    + _rect(48, 18, 9, 6, "#3ac070", 1)
    + _ellipse(52.5, 38, 4.5, 4.5, "#5a606a"),
    "oven1": _rect(8, 4, 48, 56, "#9aa0a8", 3)
    + _rect(8, 4, 48, 12, "#6a7078", 3)
    + "".join(_ellipse(x, 10, 3, 3, "#e8e8e8") for x in (16, 27, 37, 48))
    + _rect(15, 26, 34, 26, "#30343c", 2)
    + _rect(15, 20, 34, 3, "#e0e4e8", 1),
    "oven2": _rect(7, 8, 50, 53, "#c4c8ce", 3)
    + "".join(_ellipse(x, 7, 7, 2.6, "#30343c") for x in (20, 44))
    + "".join(_ellipse(x, 15, 2.6, 2.6, "#30343c") for x in (15, 24, 40, 49))
    + _rect(14, 28, 36, 26, "#3a3e46", 3)
    + _rect(14, 22, 36, 3, "#5a606a", 1),
    "toaster1": _rect(8, 24, 48, 32, "#c88a5a", 8)
    + _rect(18, 10, 12, 16, "#e0b880", 4)
    + _rect(34, 10, 12, 16, "#e0b880", 4)
    + _rect(8, 24, 48, 8, "#a86c40", 4)
    + _rect(54, 34, 6, 5, "#333", 1)
    + _rect(12, 55, 40, 4, "#444", 1),
    "toaster2": _path("M10 56V34Q10 24 20 24H44Q54 24 54 34V56Z", "#d09a70")
    + _rect(19, 8, 26, 18, "#e8c890", 6)
    + _rect(16, 24, 32, 4, "#444", 1)
    + _rect(53, 32, 5, 6, "#333", 1)
    + _ellipse(22, 48, 3, 3, "#333"),
    "sink1": _path("M30 30V12Q30 5 38 5Q46 5 46 13", width=5, stroke="#8a929a")
    + _path("M4 32H60Q58 54 44 56H20Q6 54 4 32Z", "#cfe0e8")
    + _rect(2, 29, 60, 6, "#a8c0cc", 2)
    + _rect(28, 56, 8, 6, "#8a929a", 1),
    "sink2": _path("M32 30V14Q32 6 24 6Q17 6 17 13", width=5, stroke="#9aa2aa")
    + _rect(38, 20, 10, 4, "#9aa2aa", 2)
    + _path("M5 33H59Q57 55 40 57H24Q7 55 5 33Z", "#b8d4e0")
    + _rect(3, 29, 58, 6, "#8fb0c0", 2),
    "fridge1": _rect(14, 3, 36, 58, "#c0ccd6", 4)
    + _path("M14 24H50")
    + _rect(18, 12, 3, 8, "#5a646e", 1)
    + _rect(18, 29, 3, 14, "#5a646e", 1),
    "vase": _path("M24 4H40L38 12Q52 26 46 46Q42 60 32 61Q22 60 18 46Q12 26 26 12Z", "#4a74b8")
    + _path("M17 30H47M17 38H47", stroke="#dce6f2", width=2.6),
    "drier1": _rect(6, 10, 42, 22, "#b8528e", 10)
    + _rect(46, 13, 13, 16, "#6a6a74", 2)
    + _turned(_rect(20, 28, 12, 30, "#a0467c", 4), 8)
    + _ellipse(18, 21, 6, 6, "#6a6a74"),
    "drier2": _path("M8 20Q8 8 22 8H58V32H22Q8 32 8 20Z", "#8a5ab0")
    + _rect(54, 7, 6, 26, "#50505a", 2)
    + _path("M16 31L24 60H35L31 31Z", "#784a9c")
    + _rect(27, 38, 4, 7, "#e8e8f0", 1),
}


def picture(svg: str) -> Image.Image:
    """The drawing, cropped and fitted into a cell."""
    big = Image.open(io.BytesIO(cairosvg.svg2png(svg.encode(), output_width=4 * CELL, output_height=4 * CELL))).convert(
        "RGBA"
    )
    big = big.crop(big.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    big.thumbnail((4 * CELL, 4 * CELL))
    scale = (CELL - 4) / max(big.size)
    small = big.resize((max(1, round(big.width * scale)), max(1, round(big.height * scale))), Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (CELL, CELL))
    out.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return out


def main(folder: Path) -> None:
    packages = {key: json.loads((folder / name / "package/icons.json").read_text()) for key, name in SETS.items()}
    rows, table = [], {}
    for category, row in ROWS.items():
        drawn, told = [], []
        for entry in row.split():
            key, name, *colour = entry.split(":")
            if key == "o":
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{OWN[name]}</svg>'
            else:
                package = packages[key]
                icon = package["icons"].get(name)
                if icon is None:
                    near = [n for n in package["icons"] if name.split("-")[0] in n][:12]
                    raise SystemExit(f"{category}: {SETS[key]} has no '{name}'; near: {', '.join(near)}")
                w, h = (icon.get(k, package.get(k, 16)) for k in ("width", "height"))
                body = icon["body"].replace("currentColor", colour[0]) if colour else icon["body"]
                if colour:
                    body = f'<g stroke="#3a3a3a" stroke-width="0.5">{body}</g>'
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0'
                    f' {w} {h}">{body}</svg>'
                )
            drawn.append(picture(svg))
            told.append({"source": SETS.get(key, "own"), "icon": name})
        rows.append(drawn)
        table[category] = told
    atlas = Image.new("RGBA", (CELL * max(map(len, rows)), CELL * len(rows)))
    for r, drawn in enumerate(rows):
        for c, image in enumerate(drawn):
            atlas.paste(image, (CELL * c, CELL * r))
    here = Path(__file__).parent
    atlas.save(here / "glyphs.png", optimize=True)
    (here / "glyphs.json").write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()) + "\n}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    main(parser.parse_args().folder)
