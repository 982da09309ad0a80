"""Answers of the store, given again to see where the model looked, since the store keeps no maps."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from rich.console import Console

from decoders import Decoder, Stack, StackError

from .. import models
from ..inputs.errors import InputError
from ..probes.watch import Watch
from ..results import Run, made
from ..runner import generate
from ..runner.progress import progress
from ..tasks import Files, Item, Task
from .page import Seen

MOST = 20_000  # questions that are looked through for those of a run


def task(config: dict) -> Task:
    """The task of a run's settings."""
    asked = config.get("task") or {}
    if "image" in asked:
        return Files(asked["image"], asked.get("recursive", False))
    if "_target_" not in asked:
        raise InputError("the run does not say what its task was, so that it cannot be shown")
    return made(asked, Task)


def items(config: dict, ids: Sequence[str]) -> dict[str, Item]:
    """The items of a run by id, in their order. How many there were is no setting of most runs, so more are asked for
    until all are there.

    Raises InputError where the task's data are missing.
    """
    known = task(config).items()
    open_ended = (
        "count" not in config["task"]
        and "_target_" in config["task"]
        and "count" in {f.name for f in dataclasses.fields(get_class(config["task"]["_target_"]))}
    )
    count, wanted = max(100, len(ids)), set(ids)
    while open_ended and wanted - {item.id for item in known} and count <= MOST:
        try:
            known = made(config["task"] | {"count": count}, Task).items()
        except InputError:  # there are not so many
            break
        count *= 2
    return {item.id: item for item in known}


def look(
    runs: dict[str, Run],
    found: dict[str, dict[str, dict]],
    known: dict[str, Item],
    wanted: Sequence[str],
    layers: int,
    batch_size: int,
    console: Console,
    load: Callable[[dict], tuple],
) -> tuple[dict[tuple[str, str], Seen | str], bool]:
    """The maps of the `wanted` items, or sentences that say why there is none, by label and id, what is wanted first
    made first; and whether Ctrl-C ended it early.

    Args:
        runs: by label.
        found: their answers, by label and id.
        known: items by id, all of the runs where they were sampled, since the rows of a batch draw together.
        load: makes the model and processor of a run's settings.
    """
    out: dict[tuple[str, str], Seen | str] = {}
    by_model: dict[str, list[str]] = {}
    for label, run in runs.items():
        by_model.setdefault(json.dumps(run.config["model"], sort_keys=True), []).append(label)
    try:
        with progress(console) as bar:
            total = bar.add_task("where the model looked", total=len(runs) * len(wanted))
            for labels in by_model.values():
                try:
                    loaded = load(runs[labels[0]].config)
                except InputError as error:
                    out |= {(label, i): f"the model could not be loaded: {error}" for label in labels for i in wanted}
                    console.print(f"no maps of {', '.join(labels)}: {error}", style="yellow", markup=False)
                    continue
                for label, group in _in_turn(labels, runs, list(known), wanted, batch_size):
                    of = [i for i in group if i in wanted]
                    out |= {
                        (label, i): seen
                        for i, seen in _again(
                            runs[label].config,
                            loaded,
                            label,
                            found[label],
                            [known[i] for i in group],
                            of,
                            layers,
                            console,
                        ).items()
                    }
                    bar.advance(total, len(of))
    except KeyboardInterrupt:
        return out, True
    return out, False


def _in_turn(
    labels: list[str], runs: dict[str, Run], ids: list[str], wanted: Sequence[str], batch_size: int
) -> list[tuple[str, list[str]]]:
    """What is run in one batch, for each run: any items, or under sampling those of the original batch; what is wanted
    first comes first.
    """
    rank = {i: k for k, i in enumerate(wanted)}
    jobs = []
    for label in labels:
        drawn = runs[label].config.get("batch_size")  # is a setting under sampling only
        groups = (
            [ids[k : k + drawn] for k in range(0, len(ids), drawn)]
            if drawn
            else [list(wanted[k : k + batch_size]) for k in range(0, len(wanted), batch_size)]
        )
        jobs += [
            (min(rank[i] for i in group if i in rank), label, group)
            for group in groups
            if any(i in rank for i in group)
        ]
    return [(label, group) for _, label, group in sorted(jobs, key=lambda job: job[0])]


def stored_model(config: dict) -> tuple:
    """The model and processor of a run's settings, which leave out where it is to run. Raises InputError for random
    weights, and for code that came with a model.
    """
    kept = {k: v for k, v in config["model"].items() if k not in ("files", "adapter files")}
    if kept.get("weights") == "random":
        raise InputError("random weights are drawn anew each time")
    if kept.get("trust_remote_code"):
        raise InputError("the run trusted code that came with the model, and a store may be someone else's")
    return models.load(
        OmegaConf.create({"device": "auto", "device_map": None, "unsupported": None, "random": None} | kept)
    )


def _again(
    config: dict,
    loaded: tuple,
    label: str,
    rows: dict[str, dict],
    asked: list[Item],
    wanted: list[str],
    layers: int,
    console: Console,
) -> dict[str, Seen | str]:
    """The maps of those wanted of one batch."""
    opened, out = [], {}
    for item in asked:
        try:
            opened.append((item, item.open()))
        except OSError as error:
            out[item.id] = f"the picture could not be read: {error}"
    if not opened:
        return out
    model, processor = loaded
    options = dict(config["search"]) | {"max_new_tokens": config["max_new_tokens"]}
    template = models.template(OmegaConf.create({"random": None} | config["model"]))
    speaker = generate.Speaker(
        model, processor, config["model"]["prompt"], options, console, len(asked), config["seed"], template
    )
    decoders = [made(options, Decoder) for options in config["decoder"].values()]
    plan = generate.Plan(label, Stack([*decoders, watch := Watch(maps=layers)]))
    try:
        inputs = generate.batch(speaker, opened)
        answers, _ = generate.answers(speaker, plan, opened, inputs)
    except (InputError, StackError) as error:
        return out | {i: f"it could not be generated again: {error}" for i in wanted}
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory with {len(opened)} pictures at a time ({label}); choose a smaller batch size"
        ) from error
    told = [value for name, value in plan.stack.record.items() if name.startswith(watch.name)][-1]
    for k, ((item, picture), row) in enumerate(zip(opened, answers, strict=False)):
        if item.id in wanted:
            grid = patches(model.config, processor, inputs, k, picture.size, told[k]["maps"].shape[-1])
            out[item.id] = seen(
                told[k], row, rows[item.id], grid, lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True)
            )
    return out


def seen(told: dict, row: dict, before: dict, grid, decode: Callable[[list[int]], str]) -> Seen | str:
    """What a recorder told of an answer, packed; a sentence where the answer is not the one of the store.

    Args:
        told: of `Watch`.
        row, before: the answer now and in the store.
    """
    if row["caption"] != before["caption"]:
        return f"another caption came out when it was generated again: {row['caption']}"
    tokens = told["tokens"][1 : row["tokens"]]
    found = ends(tokens, row["caption"], decode)
    if found is None:
        return "the forwards seen are not those of this caption"
    m = min(row["tokens"], len(told["maps"]))
    weights, left = (told[name][:m].float().numpy() for name in ("maps", "left"))
    events = [0, *(k for k in range(1, m) if not np.array_equal(left[k], left[k - 1]))]
    largest, sums = weights.max(-1), weights.sum(-1)
    scaled = np.rint(255 * weights / np.maximum(largest, 1e-12)[..., None]).astype(np.uint8)
    parts = (largest.astype("<f4"), sums.astype("<f4"), scaled, np.rint(255 * left[events]).astype(np.uint8))
    data = gzip.compress(b"".join(part.tobytes() for part in parts), mtime=0)
    curve = np.average(sums / np.maximum(left.sum(-1), 1), axis=1, weights=told["layers"])
    return Seen(
        found,
        told["layers"],
        grid,
        [k + 1 for k in events],
        [round(float(v), 7) for v in curve],
        base64.b64encode(data).decode(),
    )


def ends(tokens: list[int], caption: str, decode: Callable[[list[int]], str], reach: int = 6) -> list[int] | None:
    """Where each token ends in the caption, which `decode` made of them all and of which white space around was cut;
    the token behind the last given ends it.

    Only the last few tokens are decoded at a time. None where they make another text.
    """
    out, length, done, text = [], 0, 0, ""
    for k in range(len(tokens)):
        first = max(0, done - reach)
        before, now = decode(tokens[first:done]), decode(tokens[first : k + 1])
        if now.startswith(before) and not now.endswith("\ufffd"):  # else the token is a part of a letter
            text, done = text + now[len(before) :], k + 1
            length = len(text)
        out.append(length)
    lead = len(text) - len(text.lstrip())
    if not caption.startswith(text.strip()):
        return None
    return [min(max(0, end - lead), len(caption)) for end in out] + [len(caption)]


def patches(
    config, processor, inputs: dict, row: int, size: tuple[int, int], count: int
) -> tuple[int, int, list[float]] | str:
    """Rows and columns of a picture's visual tokens, and where they lie on it (left, top, width, height, as shares of
    it); a sentence where that is not known.

    Args:
        config: the model's.
        inputs: of the batch, in which the picture is row `row`.
        size: width and height of the picture.
        count: its visual tokens.
    """
    grids, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if grids is not None:
        merge = getattr(config.vision_config, "spatial_merge_size", 1)
        frames, high, wide = grids[row].tolist()
        if len(grids) == len(inputs["input_ids"]) and frames == 1 and (high // merge) * (wide // merge) == count:
            return high // merge, wide // merge, [0, 0, 1, 1]
        return f"its {count} visual tokens do not make the grid that the processor names"
    if hasattr(config, "qformer_config"):
        return f"its {count} visual tokens stand for no places: a Q-Former makes them of the whole picture"
    one = pixels is not None and (
        pixels.shape[1] == 1 if pixels.ndim == 5 else pixels.ndim == 4 and len(pixels) == len(inputs["input_ids"])
    )
    side, taken = round(count**0.5), processor.image_processor
    if not one or "image_sizes" in inputs or side * side != count or getattr(taken, "do_pad", False):
        return f"its {count} visual tokens are of several tiles, or not of a square grid"
    width, height = size
    whole, crop = dict(taken.size or {}).get("shortest_edge"), dict(getattr(taken, "crop_size", None) or {})
    if getattr(taken, "do_center_crop", False) and whole and crop:
        part = crop["height"] / whole * min(width, height)  # of the picture's own pixels
        return (
            side,
            side,
            [round(v, 5) for v in ((1 - part / width) / 2, (1 - part / height) / 2, part / width, part / height)],
        )
    return side, side, [0, 0, 1, 1]
