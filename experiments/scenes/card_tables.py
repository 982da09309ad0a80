"""The tables of the embedded model's card, as Markdown, from the numbers that `evaluate` kept.

Each is made of the numbers by set of weights: `{"shipped": ..., "seed0": ...}`, the first being the one described.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from textwrap import fill

METRICS = {
    "chair_s": "CHAIR_S",
    "chair_i": "CHAIR_I",
    "chair_i_unique": "CHAIR_I unique",
    "recall": "recall",
    "f1": "F1",
    "words": "words",
    "mentions": "mentions",
}
FLOORS = {"shuffled": "floor: picture of another kind of place", "blank": "floor: background alone"}
_FORMS = ("typical", "absent", "crowded")
_ASKED = {"typical": "typical", "absent": "absent", "blank": FLOORS["blank"]}  # pictures of the questions

Numbers = dict[str, dict]


def targets(numbers: dict) -> list[tuple[str, float | None, bool]]:
    """(what, value if there is one, whether it is within the target) of what the model is to reach."""
    typical, absent, asked = numbers["forms"]["typical"], numbers["forms"]["absent"], numbers["questions"]["typical"]

    def held(name: str, value: float | None, low: float, high: float = math.inf) -> tuple[str, float | None, bool]:
        bounds = f">= {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        return f"{name} ({bounds})", value, value is not None and low <= value <= high

    one, other = absent["chair_i_unique"]["value"], typical["chair_i_unique"]["value"]

    return [
        held("typical: recall", typical["recall"]["value"], 70),
        held("typical: CHAIR_I unique", typical["chair_i_unique"]["value"], 8, 25),
        held("typical: CHAIR_S", typical["chair_s"]["value"], 30, 65),
        held("absent: CHAIR_I unique, times that of typical", one / other if other else None, 1.5),
        held("typical: positions right, of objects that are there", typical["claims"]["position"]["value"], 70),
        held("POPE random: accuracy", asked["random"]["accuracy"]["value"], 75),
        *(
            held(f"POPE {split}: yes-rate", asked[split]["yes"]["value"], 35, 65)
            for split in ("random", "popular", "adversarial")
        ),
    ]


def every(found: Numbers) -> Iterator[str]:
    """Every table, with its title."""
    yield _targets(found)
    yield _captions(found)
    yield _attributes(found)
    yield _pope(found)
    yield _other_questions(found)
    yield _hard(found)
    yield _along(found)
    yield _usual(found)
    yield _attention(found)
    for name, numbers in found.items():
        if numbers.get("decoding"):
            yield _decoders(name, numbers)


def _part(title: str, head: Iterable[str], rows: list[list[str]], note: str = "") -> str:
    """A table with its title; the first column has none."""
    head = ["", *head]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return fill(f"**{title}**{note and f' ({note})'}", 120) + "\n\n" + "\n".join(lines)


def _cell(v: dict | None, sign: str = "") -> str:
    """A value with its interval."""
    if not v or v["value"] is None:
        return ""
    return f"{v['value']:{sign}.1f} [{v['low']:{sign}.1f}, {v['high']:{sign}.1f}]"


def _counted(v: dict) -> str:
    """A value with its interval, and of how many."""
    return f"{_cell(v)}, n = {v['n']}"


def _first(found: Numbers) -> dict:
    return next(iter(found.values()))


def _targets(found: Numbers) -> str:
    by_name = [targets(numbers) for numbers in found.values()]
    rows = []
    for same in zip(*by_name, strict=True):
        cells = (f"{'none' if v is None else f'{v:.3g}'} {'ok' if held else '**missed**'}" for _, v, held in same)
        rows.append([same[0][0], *cells])
    first = _first(found)
    note = f"test split, greedy, n = {first['count']} scenes; POPE on {first.get('asked', first['smaller'])}"
    return _part("Targets", found, rows, note)


def _captions(found: Numbers) -> str:
    which = [
        *((form, "forms", form) for form in _FORMS),
        *((title, "floors", floor) for floor, title in FLOORS.items()),
        ("prompt for a short caption", "prompts", "short"),
        ("prompt for a list", "prompts", "list"),
    ]
    rows = [
        [f"{title}, {name}", *(_cell(numbers[group][kind][m]) for m in METRICS)]
        for title, group, kind in which
        for name, numbers in found.items()
    ]
    first = _first(found)
    note = (
        f"typical and absent n = {first['count']}, others n = {first['smaller']}; 95 % intervals, bootstrap over scenes"
    )
    return _part("Captions", METRICS.values(), rows, note)


def _attributes(found: Numbers) -> str:
    claims = ("position", "colour", "size", "count", "relation")
    rows = []
    for title, group, kind in [
        *((form, "forms", form) for form in _FORMS),
        *((title, "floors", floor) for floor, title in FLOORS.items()),
    ]:
        for name, numbers in found.items():
            v = numbers[group][kind]
            rows.append(
                [
                    f"{title}, {name}",
                    *(_cell(v["claims"][claim]) for claim in claims),
                    _cell(v["claims"]["position"]["of_all"]),
                    " / ".join(f"{v['tokens'][p]:.0f}" for p in ("p5", "p50", "p95")),
                ]
            )
    head = [*claims, "position, hallucinated objects as wrong", "tokens, 5th / 50th / 95th percentile"]
    return _part("Attributes, per cent right of what is said of objects that are there", head, rows)


def _pope(found: Numbers) -> str:
    rows = []
    for form, title in _ASKED.items():
        for split in ("random", "popular", "adversarial"):
            for name, numbers in found.items():
                v = numbers["questions"][form][split]
                cells = (_cell(v[m]) for m in ("accuracy", "precision", "recall", "f1", "yes"))
                rows.append([f"{title}, {split}, {name}", *cells, str(v["n"])])
    return _part("POPE", ["accuracy", "precision", "recall", "F1", "yes-rate", "questions"], rows)


def _other_questions(found: Numbers) -> str:
    rows = []
    for form, title in _ASKED.items():
        for name, numbers in found.items():
            v = numbers["questions"][form]
            rows.append(
                [f"{title}, {name}", *(_counted(v[k]) for k in ("colour", "count", "count, several", "position"))]
            )
    return _part("Other questions, per cent right", ["colour", "count", "of these, on several", "position"], rows)


def _hard(found: Numbers) -> str:
    rows = [[kind, *(_counted(n["hard"][kind]) for n in found.values())] for kind in _first(found)["hard"]]
    return _part("Recall by what makes an object hard to see", found, rows, "typical; single ones of their category")


def _along(found: Numbers) -> str:
    along = [numbers["along"] for numbers in found.values()]
    places = len(along[0]["by_order"])
    rows = []
    for k in range(1, places + 1):
        ending = "th" if k > 3 else ("st", "nd", "rd")[k - 1]
        title = f"{k}{ending}{' and later' if k == places else ''} object"
        rows.append([title, *(_counted(each["by_order"][k - 1]) for each in along)])
    for k in range(1, len(along[0]["by_fifth"]) + 1):
        rows.append([f"fifth {k} of the caption", *(_counted(each["by_fifth"][k - 1]) for each in along)])
    return _part("Hallucinated, per cent of the objects first named there", found, rows, "typical")


def _usual(found: Numbers) -> str:
    row = ["usual in that kind of place", *(_counted(numbers["usual"]) for numbers in found.values())]
    return _part("Hallucinated objects, per cent of them", found, [row], "typical")


def _attention(found: Numbers) -> str:
    along = [numbers["along"] for numbers in found.values()]
    kinds = ("true", "hallucinated")
    rows = [
        [f"attention to the picture at {kind} objects, %", *(_cell(each["all_layers"][kind]) for each in along)]
        for kind in kinds
    ]
    for title, key in (
        ("hallucinated minus true", "difference"),
        ("the same within fifths of the caption", "difference_same_fifth"),
    ):
        rows.append([title, *(_cell(each[key], "+") for each in along)])
    title = "chance that a hallucinated object gets less of it than a true one, %"
    rows.append([title, *(_cell(each["auc"]) for each in along)])
    for k in range(len(along[0]["by_layer"])):
        cells = ("; ".join(_cell(each["by_layer"][k][kind]) for kind in kinds) for each in along)
        rows.append([f"layer {k}: true; hallucinated", *cells])
    for step in (1, 5, 10, 20, 40, 60, 80, 100):
        if step <= len(along[0]["by_step"]):
            cells = (_cell(each["by_step"][step - 1]) if step <= len(each["by_step"]) else "" for each in along)
            rows.append([f"attention to the picture at step {step}, %", *cells])
    note = (
        "typical; share of all attention, mean over heads and layers; at the forward that makes the object's first"
        " token; intervals by captions"
    )
    return _part("Attention to the picture", found, rows, note)


def _decoders(name: str, numbers: dict) -> str:
    rows = []
    for form, plans in numbers["decoding"].items():
        for label, v in plans.items():
            rows.append([f"{form} `{label}`", *(_cell(v[m]) for m in METRICS)])
            if "difference" in v:
                cells = (_cell(v["difference"][m], "+") for m in METRICS)
                rows.append([f"minus `[]` ({v['prunes']:.1f} prunes a caption)", *cells])
    note = f"validation split, n = {numbers['smaller']}, paired"
    return _part(f"Decoders on {name}", METRICS.values(), rows, note)
