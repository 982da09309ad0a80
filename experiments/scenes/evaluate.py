"""Print the numbers of the model card: `python -m experiments.scenes.evaluate`.

Captions of held-out scenes (`typical`, `absent`) by the empty stack, PruneHal and its random control, the floor with shuffled pictures, and
yes/no questions. Captions are kept in the output folder; started again, the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from decoders import Stack
from prunehal import PruneHal

from ..data import Item
from ..describe import Plan, Store, describe
from ..metrics import chair
from ..models import ROOT, encode, entry, load
from . import world
from .language import CAPTION_PROMPT, questions

SHOWN = ("chair_s", "chair_i", "chair_i_unique", "recall", "f1", "words", "mentions")


def stacks() -> list[Plan]:
    return [
        Plan("[]", Stack([])),
        Plan("[prunehal]", Stack([PruneHal(r=0.4, t=3)])),
        Plan("[prunehal] keep=random", Stack([PruneHal(r=0.4, t=3, keep="random")])),
        Plan("[prunehal] r=0.9 t=4", Stack([PruneHal(r=0.9, t=4)])),
    ]


def items(split: str, count: int, shuffled: bool = False) -> list[Item]:
    """Scenes of a split; shuffled, each with the picture of the next scene of another kind."""
    scenes = [world.draw(split, i) for i in range(count)]
    out = []
    for i, scene in enumerate(scenes):
        shown = next(scenes[(i + k) % count] for k in range(1, count) if scenes[(i + k) % count].kind != scene.kind) if shuffled else scene
        out.append(Item(("shuffled-" if shuffled else "") + scene.id, scene.objects, shown))
    return out


def _row(name: str, values: dict, sign: str = "") -> str:
    cells = [f"{values[m]['value']:{sign}.1f} [{values[m]['low']:{sign}.1f}, {values[m]['high']:{sign}.1f}]" for m in SHOWN]
    return f"| {name} | " + " | ".join(cells) + " |"


def ask(model, processor, split: str, count: int) -> tuple[float, float, int]:
    """(accuracy, yes-rate, questions) on two questions a scene, one of each answer."""
    right, yes, total = 0, 0, 0
    for at in range(0, count, 20):
        scenes = [world.draw(split, i) for i in range(at, min(at + 20, count))]
        for j in range(2):
            pairs = [questions(s, 2)[j] for s in scenes]
            pictures = [world.render(s) for s in scenes]
            for k, (question, answer) in enumerate(pairs):
                inputs = encode(processor, [pictures[k]], question, model.device)
                out = Stack([]).generate(model, **inputs, max_new_tokens=2, do_sample=False)
                said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).strip().lower().startswith("yes")
                right, yes, total = right + (said == answer.startswith("Yes")), yes + said, total + 1
    return 100 * right / total, 100 * yes / total, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=500, help="scenes of each split")
    parser.add_argument("--questions", type=int, default=150, help="scenes asked about")
    parser.add_argument("--out", type=Path, default=Path("outputs/scenes-card"))
    args = parser.parse_args()
    args.out = args.out / world.fingerprint(ROOT / "experiments/scenes/model/model.safetensors")
    args.out.mkdir(parents=True, exist_ok=True)
    model, processor = load(entry("scenes"))
    console, options = Console(stderr=True), {"do_sample": False, "max_new_tokens": 160}
    print("| n = %d, greedy | " % args.count + " | ".join(SHOWN) + " |\n|" + "---|" * (len(SHOWN) + 1))
    for split in ("typical", "absent"):
        pictures = items(split, args.count)
        scored: dict[str, list] = {}
        for plan in stacks():
            store = Store(args.out)
            describe(model, processor, plan, pictures, store, CAPTION_PROMPT, 25, options, 0, console)
            rows = {r["image"]: r for r in store.rows if r["stack"] == plan.label}
            scored[plan.label] = [chair.score(rows[p.id]["caption"], p.objects) for p in pictures]
            print(_row(f"{split} `{plan.label}`", chair.summary(scored[plan.label])))
            if plan.label != "[]":
                prunes = np.mean([len(rows[p.id]["prunes"]) for p in pictures])
                print(_row(f"{split} `{plan.label}` minus `[]` ({prunes:.1f} prunes a caption)", chair.difference(scored[plan.label], scored["[]"]), "+"))
    store, shuffled = Store(args.out), items("typical", args.count, shuffled=True)
    describe(model, processor, stacks()[0], shuffled, store, CAPTION_PROMPT, 25, options, 0, console)
    rows = {r["image"]: r for r in store.rows}
    print(_row("typical, pictures shuffled, `[]`", chair.summary([chair.score(rows[p.id]["caption"], p.objects) for p in shuffled])))
    lengths = [r["tokens"] for r in store.rows if r["stack"] == "[]" and r["image"].startswith("typical")]
    print(f"\ncaption tokens, 5th, 50th and 95th percentile: {', '.join(f'{v:.0f}' for v in np.percentile(lengths, [5, 50, 95]))}")
    for split in ("typical", "absent"):
        print("yes/no questions on %s: accuracy %.1f %%, yes-rate %.1f %%, n = %d" % (split, *ask(model, processor, split, args.questions)))


if __name__ == "__main__":
    main()
