"""Describe pictures with several stacks, keep every caption as it comes, and score what was said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from decoders import Stack

from .data import Item
from .errors import InputError, PictureError
from .metrics import chair
from .models import encode


@dataclass
class Plan:
    """One stack to run: its label, as on the command line, and its decoders."""

    label: str
    stack: Stack


def plans(decoders, compare: bool) -> list[Plan]:
    """The stack of a config, and the empty one beside it."""
    built = [instantiate(node) for node in decoders.values()] if decoders else []
    label = f"[{','.join(decoders or {})}]"
    return [Plan("[]", Stack([]))] * bool(compare and built) + [Plan(label, Stack(built))]


class Store:
    """`captions.jsonl`: one line an image and stack, written as it comes; what is there is not done again."""

    def __init__(self, folder: Path):
        self.file = folder / "captions.jsonl"
        self.rows: list[dict] = []
        if self.file.exists():
            lines = self.file.read_text().splitlines()
            for number, line in enumerate(lines):
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    if number + 1 < len(lines):
                        raise InputError(f"{self.file}, line {number + 1} is no JSON; mend or remove it") from error
                    whole = self.file.with_suffix(".tmp")  # without the half-written last line
                    whole.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
                    whole.replace(self.file)

    def done(self, label: str) -> set[str]:
        return {row["image"] for row in self.rows if row["stack"] == label}

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()


def describe(model, processor, plan: Plan, items: Iterable[Item], store: Store, prompt: str, batch_size: int, options: dict, seed: int, console: Console, template: str | None = None) -> list[str]:
    """Caption what the store lacks; returns the ids of pictures that could not be read."""
    finished, unreadable = store.done(plan.label), []
    todo = [item for item in items if item.id not in finished]
    columns = (TextColumn("{task.description:>24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        job = bar.add_task(plan.label, total=len(todo), note="")
        at = 0
        while at < len(todo):
            group = todo[at : at + batch_size]
            opened, unknown = [], []
            for item in group:
                try:
                    opened.append((item, item.open()))
                except OSError as error:
                    unknown.append((item.id, error))
            try:
                inputs = _inputs(model, processor, opened, prompt, template)
            except PictureError:  # which of them is it?
                opened, unknown = _taken(model, processor, opened, unknown, prompt, template)
                inputs = _inputs(model, processor, opened, prompt, template)
            for name, error in unknown:
                if name not in unreadable:
                    unreadable.append(name)
                    console.print(f"skipped {name}: {error}", style="yellow", markup=False)
            if opened:
                found = _fitting(model, processor, plan, opened, inputs, options, seed)
                if found is None:
                    if len(opened) == 1:
                        raise InputError(f"out of memory with one image at a time ({plan.label}, {opened[0][0].id}): use a smaller model, model.quantization=4bit, fewer beams or max_new_tokens")
                    batch_size = (len(group) + 1) // 2
                    console.print(f"out of memory: going on with batch_size={batch_size}", style="yellow", markup=False)
                    continue
                rows, seconds = found
                share = seconds / sum(row["tokens"] for row in rows)
                for row in rows:
                    store.add(row | {"seconds": round(share * row["tokens"], 4)})
                bar.update(job, note=f"{1 / share:.0f} tokens/s")
            bar.advance(job, len(group))
            at += len(group)
    return unreadable


def _fitting(*args) -> tuple[list[dict], float] | None:
    """`_captions`, or None where the device has not the memory for so many rows."""
    try:
        return _captions(*args)
    except torch.OutOfMemoryError:
        pass  # what the error holds is free only outside this clause
    torch.cuda.empty_cache()
    return None


def _inputs(model, processor, opened: list, prompt: str, template: str | None) -> dict:
    if not opened:
        return {}
    inputs = encode(processor, [image for _, image in opened], prompt, model.device, template)
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _taken(model, processor, opened: list, unknown: list, prompt: str, template: str | None) -> tuple[list, list]:
    """The pictures that the processor takes, and the others with the reason; an error if it takes none."""
    taken, errors = [], []
    for item, image in opened:
        try:
            _inputs(model, processor, [(item, image)], prompt, template)
            taken.append((item, image))
        except PictureError as error:
            errors.append((item.id, error))
    if not taken and len(opened) > 1:
        raise errors[0][1]
    return taken, unknown + errors


def _captions(model, processor, plan: Plan, opened: list, inputs: dict, options: dict, seed: int) -> tuple[list[dict], float]:
    """A row an image, and the seconds that generation alone took, prefill included."""
    start = inputs["input_ids"].shape[1]
    seeds = [crc32(item.id.encode()) for item, _ in opened]
    if options.get("do_sample"):
        torch.manual_seed(seed + seeds[0])
    begin = time.perf_counter()
    out = plan.stack.generate(model, **inputs, **options, seeds=seeds)[:, start:].cpu()
    seconds = time.perf_counter() - begin
    record = plan.stack.record
    eos = model.generation_config.eos_token_id
    ends = set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
    rows = []
    for i, (item, _) in enumerate(opened):
        ids = out[i].tolist()
        stop = next((j for j, t in enumerate(ids) if t in ends), len(ids))
        caption = processor.tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
        row = {"image": item.id, "stack": plan.label, "caption": caption, "tokens": min(stop + 1, len(ids))}
        row |= _objects(item, caption, processor.tokenizer, ids[:stop])
        told = [value[i] for value in record.values() if isinstance(value, list) and isinstance(value[i], dict)]
        row["prunes"] = [{"step": p["step"], "votes": sum(p["votes"]), "kept": len(p["kept"][0])} for t in told for p in t.get("prunes", [])]
        row["rollbacks"] = [back for t in told for back in t.get("rollbacks", [])]
        for kept in [t["row"] for t in told if "row" in t]:
            row |= kept
        for curve in [t["attention"] for t in told if "attention" in t][:1]:
            row["attention"] = [round(v, 7) for v in curve[: row["tokens"]].mean(-1).tolist()]
        rows.append(row)
    return rows, seconds


def _objects(item: Item, caption: str, tokenizer, ids: list[int]) -> dict:
    """What the caption names: every mention with its words, place in the text and generated token."""
    scored = chair.score(caption, item.objects or [])
    lengths = [len(tokenizer.decode(ids[: j + 1], skip_special_tokens=True).strip()) for j in range(len(ids))]
    mentions = [
        {"words": m.words, "object": m.category, "start": m.start, "end": m.end, "token": next((j for j, n in enumerate(lengths) if n > m.start), len(ids) - 1)}
        for m in scored.mentions
    ]
    return {"objects": item.objects, "mentions": mentions, "hallucinated": sorted(scored.hallucinated) if item.objects is not None else None}


def measure(rows: list[dict], labels: list[str]) -> dict[str, dict]:
    """CHAIR of each stack with intervals, speed, prunes, and the paired difference from the first stack."""
    ids = [r["image"] for r in rows if r["stack"] == labels[0] and r["objects"] is not None]
    by = {label: {r["image"]: r for r in rows if r["stack"] == label} for label in labels}
    ids = [i for i in dict.fromkeys(ids) if all(i in by[label] for label in labels)]
    scores = {label: [chair.score(by[label][i]["caption"], by[label][i]["objects"]) for i in ids] for label in labels}
    out = {}
    for label in labels:
        mine = list(by[label].values())
        seconds = sum(r["seconds"] for r in mine)
        out[label] = chair.summary(scores[label]) | {
            "tokens_per_second": sum(r["tokens"] for r in mine) / seconds if seconds else 0.0,
            "prunes": sum(len(r["prunes"]) for r in mine) / max(1, len(mine)),
            "rollbacks": sum(len(r["rollbacks"]) for r in mine) / max(1, len(mine)),
        }
        if label != labels[0] and ids:
            out[label]["difference"] = chair.difference(scores[label], scores[labels[0]])
    return out
