"""Measure the embedded model and write its card: `python -m experiments.scenes.evaluate`.

Captions of the frozen test scenes in every form, floors without the right picture, questions, what makes an object hard
to see, how the chance of a hallucination and the attention to the picture go along a caption, and what decoders do on
validation scenes. Numbers go into `card/NAME.json`, pictures and tables into the card. Captions are kept in the store
of results; started again, the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from decoders import Stack
from prunehal import PruneHal

from ..inputs import conf_files
from ..inputs.errors import InputError
from ..metrics import chair, pope
from ..metrics.bootstrap import auc, interval, share, weights
from ..models import DTYPES, encode, entry, identity, load
from ..probes.watch import Watch
from ..results import DEFAULT, Results
from ..runner.generate import Plan, Speaker, describe
from ..tasks import Item
from . import card, frozen, world
from .language import CAPTION_PROMPT, NUMBERS, PLACES, PROMPTS, Question, about, claims, existence

OPTIONS = {"do_sample": False, "max_new_tokens": 256}
PLAIN = Plan("[]", Stack([]))
WATCHED = Plan("[] watched", Stack([Watch()]))
DECODERS = [
    Plan("[prunehal]", Stack([PruneHal(r=0.4, t=3)])),
    Plan("[prunehal] keep=random", Stack([PruneHal(r=0.4, t=3, keep="random")])),
    Plan("[prunehal] r=0.9 t=4", Stack([PruneHal(r=0.9, t=4)])),
]
FIFTHS = 5  # of a caption


class Bench:
    """The model, its captions so far, and the console."""

    def __init__(self, model: str | None, store: Results, dtype: str | None = None):
        known = conf_files.files("model")
        config = entry(model if model in known else "scenes")
        if model and model not in known:
            config.path = str(Path(model).resolve())
        config.dtype = dtype or config.dtype
        self.identity, self.store = identity(config), store
        self.model, self.processor = load(config)
        self.console = Console(stderr=True)

    def captions(self, name: str, plan: Plan, items: list[Item], prompt: str = CAPTION_PROMPT) -> list[dict]:
        """A row an item, in order; what the store holds is not done again."""
        run = self.store.open(
            plan.label,
            {"card": name, "decoder": repr(plan.stack), "model": self.identity, "prompt": prompt, "search": OPTIONS},
        )
        self.console.print(f"{name}, {len(items)} pictures", markup=False)
        describe(Speaker(self.model, self.processor, prompt, OPTIONS, self.console, 50), plan, items, self.store, run)
        return self.store.rows(run, [item.id for item in items])

    def answers(self, asked: list[tuple[world.Scene, Question]], longest: int = 20) -> list[str]:
        """What the model says to each question, greedily, in up to `longest` tokens."""
        out = []
        for at in track(range(0, len(asked), 50), f"{len(asked)} questions", console=self.console):
            part = asked[at : at + 50]
            inputs = encode(
                self.processor, [world.render(s) for s, _ in part], [q.text for _, q in part], self.model.device
            )
            said = Stack([]).generate(self.model, **inputs, max_new_tokens=longest, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
            out += [t.strip() for t in self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)]
        return out


def scenes(split: str, form: str, count: int) -> list[world.Scene]:
    return [world.draw(split, form, i) for i in range(count)]


def items(found: list[world.Scene], shown: list[world.Scene] | None = None, prefix: str = "") -> list[Item]:
    """Each scene's objects with its own picture, or with that of another."""
    return [Item(prefix + s.id, s.objects, p) for s, p in zip(found, shown or found, strict=False)]


def shuffled(found: list[world.Scene]) -> list[world.Scene]:
    """For each scene the next one of another kind."""
    n = len(found)
    return [
        next(found[(i + k) % n] for k in range(1, n) if found[(i + k) % n].kind != s.kind) for i, s in enumerate(found)
    ]


def emptied(found: list[world.Scene]) -> list[world.Scene]:
    """Each scene's background alone."""
    return [world.Scene(s.split, s.form, s.index, s.kind) for s in found]


def said(found: list[world.Scene], rows: list[dict]) -> dict:
    """CHAIR, and what is claimed of sizes, colours, counts, places and relations: of the objects that are there, how
    often it is right.
    """
    out = chair.summary([chair.score(r["caption"], s.objects) for s, r in zip(found, rows, strict=False)])
    out["tokens"] = dict(
        zip(("p5", "p50", "p95"), np.percentile([r["tokens"] for r in rows], [5, 50, 95]).tolist(), strict=False)
    )
    right: dict[str, np.ndarray] = {
        k: np.zeros((len(found), 3)) for k in ("position", "colour", "size", "count", "relation")
    }
    for i, (scene, row) in enumerate(zip(found, rows, strict=False)):
        for claim in claims(row["caption"]):
            true = claim.true(scene)
            right[claim.kind][i] += (bool(true), true is not None, 1)
    out["claims"] = {k: share(t[:, 0], t[:, 1]) | {"of_all": share(t[:, 0], t[:, 2])} for k, t in right.items()}
    return out


def hard(found: list[world.Scene], rows: list[dict]) -> dict:
    """Recall of objects by what makes them hard to see; of objects of which there is one in the picture."""
    groups: dict[str, Callable[[world.Thing, float], bool]] = {
        "tiny": lambda t, v: t.size < 16,
        "faint": lambda t, v: t.opacity < 0.5,
        "mostly hidden": lambda t, v: v < 0.6 and t.size >= 16 and t.opacity >= 0.5,
        "plain to see": lambda t, v: v >= 0.6 and t.size >= 16 and t.opacity >= 0.5,
        "plain to see, drawing of training": lambda t, v: groups["plain to see"](t, v) and not held(t),
        "plain to see, held-out drawing": lambda t, v: groups["plain to see"](t, v) and held(t),
        "plain to see, held-out size": (
            lambda t, v: groups["plain to see"](t, v) and t.size > (72 if t.name in world.BIG else 56)
        ),
    }
    counts = {name: np.zeros((len(found), 2)) for name in groups}
    for i, (scene, row) in enumerate(zip(found, rows, strict=False)):
        named = {m["object"] for m in row["mentions"]}
        for thing, visible in zip(scene.things, scene.visible, strict=False):
            if len(scene.of(thing.name)) == 1:
                for name, belongs in groups.items():
                    if belongs(thing, visible):
                        counts[name][i] += (thing.name in named, 1)
    return {name: share(*c.T) for name, c in counts.items()}


def held(thing: world.Thing) -> bool:
    return thing.drawing == len(world.drawings()[thing.name]) - 1


def asked(
    bench: Bench, found: list[world.Scene], typical: list[world.Scene], shown: list[world.Scene] | None = None
) -> dict:
    """POPE in its three forms, and questions on colour, count and place, of each scene's own picture, or of another;
    what usually stands together is counted from `typical`.
    """
    picture = {s.id: p for s, p in zip(found, shown or found, strict=False)}
    objects = {s.id: s.objects for s in found}
    by_split = {split: pope.probes(objects, split, counted={s.id: s.objects for s in typical}) for split in pope.SPLITS}
    every = list(dict.fromkeys(p for probes in by_split.values() for p in probes))
    heard = bench.answers(
        [(picture[p.image], existence(p.name, p.there)) for p in every], 4
    )  # "Yes, there is" or "No, there is"
    answer = {p: pope.yes(t) for p, t in zip(every, heard, strict=False)}
    out = {split: pope.summary(probes, [answer[p] for p in probes]) for split, probes in by_split.items()}
    chosen: list[tuple[world.Scene, Question]] = []
    for scene in found:
        rng = np.random.default_rng([world.SPLITS[scene.split], scene.index, 17])
        questions = about(scene)
        for kind in ("colour", "count", "position"):
            pool = [q for q in questions if q.kind == kind]
            if kind == "count" and rng.random() < 0.5:  # more of them on several
                pool = [q for q in pool if q.answer != "one"] or pool
            if pool:
                chosen.append((picture[scene.id], pool[rng.integers(len(pool))]))
    texts = bench.answers(chosen)
    for kind in ("colour", "count", "position"):
        right = [correct(q, text) for (_, q), text in zip(chosen, texts, strict=False) if q.kind == kind]
        out[kind] = share(right, np.ones(len(right)))
    several = [
        correct(q, text) for (_, q), text in zip(chosen, texts, strict=False) if q.kind == "count" and q.answer != "one"
    ]
    return out | {"count, several": share(several, np.ones(len(several)))}


def correct(question: Question, text: str) -> bool:
    """Whether an answer holds the right word or place and no other of its kind."""
    meaning = {
        "colour": {c: c for c in world.COLOURS},
        "count": {n: n for n in NUMBERS.values()},
        "position": {phrase: both[0] for both in PLACES.values() for phrase in both},
    }[question.kind]
    phrases = "|".join(sorted(meaning, key=len, reverse=True))  # "at the top left" is not "at the top"
    return {meaning[p] for p in re.findall(rf"\b(?:{phrases})\b", text.lower())} == {question.answer}


def along(found: list[world.Scene], rows: list[dict]) -> dict:
    """How hallucination and attention to the picture go along a caption; intervals from a bootstrap over captions."""
    last = 10
    places = np.zeros((len(rows), last, 2))
    fifths = np.zeros((len(rows), FIFTHS, 2))
    layers = len(rows[0]["attention_by_layer"][0])
    steps = 120
    curve, seen = np.zeros((len(rows), steps, layers)), np.zeros((len(rows), steps))
    at = np.zeros(
        (len(rows), FIFTHS, 2, layers + 1)
    )  # fifth of the caption, true or hallucinated: sums of attention by layer, and their number
    named = []  # caption, hallucinated or not, attention
    for i, (scene, row) in enumerate(zip(found, rows, strict=False)):
        attention = np.array(row["attention_by_layer"])[: row["tokens"]]
        n = min(steps, len(attention))
        curve[i, :n], seen[i, :n] = attention[:n], 1
        told = set()
        order = 0
        for m in row["mentions"]:
            if m["object"] in told:
                continue
            told.add(m["object"])
            false = m["object"] not in scene.objects
            fifth = min(FIFTHS - 1, FIFTHS * m["token"] // max(1, row["tokens"]))
            places[i, min(order, last - 1)] += (false, 1)
            fifths[i, fifth] += (false, 1)
            if m["token"] < len(attention):  # the forward that made the object's first token
                at[i, fifth, int(false)] += (*attention[m["token"]], 1)
                named.append((i, false, attention[m["token"]].mean()))
            order += 1
    draw = weights(len(rows))
    out: dict = {
        "by_order": [share(*places[:, k].T) for k in range(last)],
        "by_fifth": [share(*fifths[:, k].T) for k in range(FIFTHS)],
    }
    point, many = (
        curve.sum(0) / np.maximum(1, seen.sum(0))[:, None],
        np.tensordot(draw, curve, 1) / np.maximum(1, draw @ seen)[..., None],
    )
    enough = seen.sum(0) >= len(rows) / 10
    out["by_step"] = [
        interval(p, m) for p, m in zip(100 * point.mean(-1)[enough], 100 * many.mean(-1).T[enough], strict=False)
    ]
    out["by_step_and_layer"] = (100 * point[enough]).round(3).T.tolist()
    sums, drawn = at.sum(0), np.tensordot(draw, at, 1)
    mean, means = _means(sums.sum(0)), _means(drawn.sum(1))
    kinds = list(enumerate(("true", "hallucinated")))
    out["by_layer"] = [
        {kind: interval(mean[k, layer], means[:, k, layer]) for k, kind in kinds} for layer in range(layers)
    ]
    out["all_layers"] = {kind: interval(mean[k].mean(), means[:, k].mean(-1)) for k, kind in kinds}
    out["difference"] = interval((mean[1] - mean[0]).mean(), (means[:, 1] - means[:, 0]).mean(-1))
    out["difference_same_fifth"] = interval(_within(sums), _within(drawn))
    out["auc"] = auc(named, draw)
    return out


def _means(sums: np.ndarray) -> np.ndarray:
    """Attention in per cent, [..., layers], from its sums and their number, [..., layers + 1]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * sums[..., :-1] / sums[..., -1:]


def _within(sums: np.ndarray) -> np.ndarray:
    """Hallucinated minus true within fifths of the caption, so that early and late are not compared: from sums [...,
    fifths, 2, layers + 1].

    Fifths count by their number of hallucinated objects; those without either kind are left out.
    """
    mean = _means(sums)
    gap = (mean[..., 1, :] - mean[..., 0, :]).mean(-1)
    by = np.where(np.isfinite(gap), sums[..., 1, -1], 0)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(gap) * by).sum(-1) / by.sum(-1)


def together(named: list[Iterable[str]]) -> np.ndarray:
    """How often categories stand together: share of the captions or pictures with the row's category that have the
    column's, [80, 80].
    """
    table = np.zeros((len(named), len(world.CATEGORIES)))
    for i, names in enumerate(named):
        table[i, [world.CATEGORIES.index(n) for n in set(names)]] = 1
    return (table.T @ table) / np.maximum(1, table.sum(0))[:, None]


def measure(bench: Bench, count: int, smaller: int, questions: int) -> tuple[dict, dict]:
    """All numbers of the card, and the tables behind its pictures.

    Args:
        count: scenes of the typical and the absent form.
        smaller: scenes of everything else but questions.
        questions: scenes that are asked about.
    """
    out: dict = {"count": count, "smaller": smaller, "asked": questions, "forms": {}, "floors": {}, "prompts": {}}
    typical = scenes("test", "typical", count)
    rows = bench.captions("typical", WATCHED, items(typical))
    out["forms"]["typical"] = said(typical, rows)
    out["hard"], out["along"] = hard(typical, rows), along(typical, rows)
    for form, n in (("absent", count), ("crowded", smaller)):
        found = scenes("test", form, n)
        out["forms"][form] = said(found, bench.captions(form, PLAIN, items(found)))
    few = typical[:smaller]
    for name, shown in (("shuffled", shuffled(few)), ("blank", emptied(few))):
        out["floors"][name] = said(few, bench.captions(name, PLAIN, items(few, shown, f"{name}-")))
    for kind in ("short", "list"):
        out["prompts"][kind] = said(few, bench.captions(kind, PLAIN, items(few), PROMPTS[kind][0]))
    out["questions"] = {
        "typical": asked(bench, few[:questions], few),
        "absent": asked(bench, scenes("test", "absent", questions), few),
        "blank": asked(bench, few[:questions], few, emptied(few[:questions])),
    }
    trained = [world.draw("train", "typical", i).objects for i in range(0, 5 * count, 5)]
    matrices = {
        "training": together(trained),
        "said": together([[m["object"] for m in r["mentions"]] for r in rows]),
        "typical": together([s.objects for s in typical]),
    }
    false = [set(r["hallucinated"]) for r in rows]
    expected = [set(world.usual(s.kind)) for s in typical]
    out["usual"] = share([len(f & e) for f, e in zip(false, expected, strict=False)], [len(f) for f in false])
    return out, matrices


def decoding(bench: Bench, count: int) -> dict:
    """What decoders do to validation scenes, paired with the empty stack."""
    out: dict = {}
    for form in ("typical", "absent"):
        found = scenes("validation", form, count)
        scored = {}
        for plan in [PLAIN, *DECODERS]:
            rows = bench.captions(f"validation-{form}", plan, items(found))
            scored[plan.label] = [chair.score(r["caption"], s.objects) for r, s in zip(rows, found, strict=False)]
            out.setdefault(form, {})[plan.label] = chair.summary(scored[plan.label]) | (
                {}
                if plan is PLAIN
                else {
                    "difference": chair.difference(scored[plan.label], scored["[]"]),
                    "prunes": float(np.mean([len(r["prunes"]) for r in rows])),
                }
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", default=None, help="folder of weights, or a model of conf/model; without it, the shipped ones"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="without it, the model's own")
    parser.add_argument(
        "--name",
        default=None,
        help="under which the numbers stand in the card; without it, 'shipped', or the name of the folder of weights",
    )
    parser.add_argument("--count", type=int, default=1000, help="scenes of the typical and the absent form")
    parser.add_argument("--smaller", type=int, default=500, help="scenes of everything else")
    parser.add_argument("--questions", type=int, default=None, help="scenes asked about; without it, as --smaller")
    parser.add_argument(
        "--decoders",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run PruneHal and its control on validation scenes",
    )
    parser.add_argument("--results", type=Path, default=DEFAULT, help="the store of captions")
    parser.add_argument("--card", type=Path, default=card.FOLDER, help="folder for numbers and pictures")
    args = parser.parse_args()
    if not 20 <= args.smaller <= args.count <= frozen.COUNT:
        parser.error(
            "--smaller is at least 20 (shares of fewer scenes say nothing), --count no less, and at most"
            f" {frozen.COUNT} (no more scenes are fixed)"
        )
    questions = args.smaller if args.questions is None else args.questions
    if not 1 <= questions <= args.smaller:
        parser.error(f"--questions is from 1 to --smaller, {args.smaller}, not {questions}")
    named = args.model in conf_files.files("model")
    if args.model and not named and not (Path(args.model) / "model.safetensors").exists():
        parser.error(
            f"no model.safetensors in '{args.model}'; train one: python -m experiments.scenes.train --out {args.model}"
        )
    name = args.name or (args.model if named else Path(args.model).resolve().name if args.model else "shipped")
    try:
        bench = Bench(args.model, Results(args.results), args.dtype)
    except InputError as error:
        parser.error(str(error))
    numbers, matrices = measure(bench, args.count, args.smaller, questions)
    if args.decoders:
        numbers["decoding"] = decoding(bench, args.smaller)
    args.card.mkdir(parents=True, exist_ok=True)
    (args.card / f"{name}.json").write_text(json.dumps(card.rounded(numbers)) + "\n")
    if named or name == "shipped":
        card.pictures(numbers, matrices, args.card)
    print(card.text(args.card))
    card.write(args.card)


if __name__ == "__main__":
    main()
