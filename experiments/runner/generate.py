"""Describe pictures with several stacks, keep every caption as it comes, and score what was said."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from zlib import crc32

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import TextColumn

from decoders import Stack

from ..inputs.errors import InputError, PictureError
from ..metrics import bootstrap, chair
from ..models import encode
from ..results import Results, Run
from ..tasks import Item, Task
from . import batches
from .progress import progress


@dataclass
class Plan:
    """One stack to run: its label, as on the command line, and its decoders."""

    label: str
    stack: Stack


def plan(decoders, compile: str = "off") -> Plan:
    """The stack of a config's `decoder`, and how its steps are run."""
    stack = Stack([instantiate(node) for node in (decoders or {}).values()], compile=compile)
    return Plan(f"[{','.join(decoders or {})}]", stack)


@dataclass
class Speaker:
    """A model, and how it is asked.

    prompt: for items that ask no question of their own.
    options: of `generate`.
    template: the prompt format; None: the processor's own.
    group_by_length: answers of similar expected length share a batch; not under sampling, whose rows draw together.
    """

    model: Any
    processor: Any
    prompt: str
    options: dict
    console: Console
    batch_size: int = 25
    seed: int = 0
    template: str | None = None
    group_by_length: bool = True
    hands: ClassVar[int] = 1  # batches at once

    def each(self, plan: Plan, batches: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Answered]]:
        """What becomes of each batch, by its number, as it is done."""
        most = self.batch_size
        for number, wanted in enumerate(batches):
            found = answer(self, plan, wanted, most)
            most = min([most, *found.sizes])
            yield number, found

    def refuse(self, plans: Sequence[Plan]) -> None:
        """Raise InputError if a decoder cannot act on the model; before others have spent their time."""
        refuse(plans, self.model)


def refuse(plans: Sequence[Plan], model) -> None:
    """Raise InputError if a decoder cannot act on the model."""
    for plan in plans:
        for name, why in plan.stack.refusals(model).items():
            if why:
                raise InputError(f"{name} cannot act on {type(model).__name__}: {why}")


def describe(speaker: Speaker, plan: Plan, items: Sequence[Item], store: Results, run: Run) -> list[str]:
    """Answer the items that the run lacks, and keep the answers batch by batch; returns the ids of those whose pictures
    could not be read.

    Batches are cut before anyone answers: by the expected lengths of the answers where other runs tell them, else in
    the order of the items; under sampling always in that order, and a batch that lacks one is drawn as a whole. So a
    run that was stopped ends in the answers of one that was not, and one of many workers in those of one. Only this
    process writes to the store.
    """
    console, done = speaker.console, store.done(run)
    lacking = sum(item.id not in done for item in items)
    if lacking < len(items):
        console.print(
            f"{plan.label}: {len(items) - lacking} of {len(items)} answers are in the store", style="dim", markup=False
        )
    sampling = bool(speaker.options.get("do_sample"))
    grouped = bool(lacking) and speaker.group_by_length and not sampling
    lengths = batches.expected_lengths(store, run, [item.id for item in items]) if grouped else {}
    wanted = batches.cut(items, speaker.batch_size, done, lengths, whole=sampling)
    unreadable: dict[str, str] = {}
    with progress(console, TextColumn("{task.fields[note]}")) as bar:
        job = bar.add_task(plan.label, total=lacking, note="")
        for number, found in speaker.each(plan, [batch for batch, _ in wanted]):
            for size in found.sizes:
                console.print(f"out of memory: going on with batch_size={size}", style="yellow", markup=False)
            for name, why in found.unreadable.items():
                console.print(f"skipped {name}: {why}", style="yellow", markup=False)
            unreadable |= found.unreadable
            if found.rows:
                store.add(run, found.rows)
                bar.update(
                    job, note=f"{found.rate:.0f} tokens/s" + (f" x {speaker.hands}" if speaker.hands > 1 else "")
                )
            bar.advance(job, wanted[number][1])
    return [item.id for item in items if item.id in unreadable]


@dataclass
class Answered:
    """What became of a batch.

    rows: an answer each, with its `seconds`.
    unreadable: those whose pictures could not be read, by id, and why.
    sizes: to how many rows at once it was cut, time after time, as the device had not the memory for more.
    rate: tokens a second of the last rows.
    """

    rows: list[dict] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    rate: float = 0.0


def answer(speaker: Speaker, plan: Plan, wanted: Sequence[Item], most: int) -> Answered:
    """Answer one batch, at most so many rows at once; nothing but the batch decides what is answered, so that any
    process may do it.

    Raises InputError where the device has not the memory for one row.
    """
    out, at = Answered(), 0
    while at < len(wanted):
        group = wanted[at : at + most]
        opened, unknown = [], []
        for item in group:
            try:
                opened.append((item, item.open()))
            except OSError as error:
                unknown.append((item.id, error))
        try:
            inputs = batch(speaker, opened)
        except PictureError:  # which of them is it?
            opened, unknown = _taken(speaker, opened, unknown)
            inputs = batch(speaker, opened)
        out.unreadable |= {name: str(error) for name, error in unknown}
        if opened:
            found = _fitting(speaker, plan, opened, inputs)
            if found is None:
                if len(opened) == 1:
                    raise InputError(
                        f"out of memory with one image at a time ({plan.label}, {opened[0][0].id}): use a smaller"
                        " model, model.quantization=4bit, fewer beams or max_new_tokens"
                    )
                if speaker.options.get("do_sample"):
                    raise InputError(
                        f"out of memory ({plan.label}, {len(opened)} images): choose a smaller batch_size than"
                        f" {speaker.batch_size}; it is not made smaller here, since the rows of a batch draw together"
                    )
                most = (len(group) + 1) // 2
                out.sizes.append(most)
                continue
            rows, seconds = found
            share = seconds / sum(row["tokens"] for row in rows)
            out.rows += [row | {"seconds": round(share * row["tokens"], 4)} for row in rows]
            out.rate = 1 / share
        at += len(group)
    return out


def _fitting(*args) -> tuple[list[dict], float] | None:
    """`answers`, or None where the device has not the memory for so many rows."""
    try:
        return answers(*args)
    except torch.OutOfMemoryError:
        pass  # what the error holds is free only outside this clause
    torch.cuda.empty_cache()
    return None


def batch(speaker: Speaker, opened: list) -> dict:
    """What the model takes for items and their pictures."""
    if not opened:
        return {}
    questions = [item.question or speaker.prompt for item, _ in opened]
    inputs = encode(
        speaker.processor, [image for _, image in opened], questions, speaker.model.device, speaker.template
    )
    return {k: v.to(speaker.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _taken(speaker: Speaker, opened: list, unknown: list) -> tuple[list, list]:
    """The pictures that the processor takes, and the others with the reason; an error if it takes none."""
    taken, errors = [], []
    for item, image in opened:
        try:
            batch(speaker, [(item, image)])
            taken.append((item, image))
        except PictureError as error:
            errors.append((item.id, error))
    if not taken and len(opened) > 1:
        raise errors[0][1]
    return taken, unknown + errors


def answers(speaker: Speaker, plan: Plan, opened: list, inputs: dict) -> tuple[list[dict], float]:
    """A row an item, and the seconds that generation alone took, prefill included."""
    model, tokenizer = speaker.model, speaker.processor.tokenizer
    start = inputs["input_ids"].shape[1]
    seeds = [crc32(item.id.encode()) for item, _ in opened]
    if speaker.options.get("do_sample"):
        torch.manual_seed(speaker.seed + seeds[0])
    begin = time.perf_counter()
    out = plan.stack.generate(model, **inputs, **speaker.options, seeds=seeds, tokenizer=speaker.processor)
    out = out[:, start:].cpu()
    seconds = time.perf_counter() - begin
    record = plan.stack.record
    rows = []
    for i, (item, _) in enumerate(opened):
        ids = spoken(model, out[i].tolist())
        caption = tokenizer.decode(ids, skip_special_tokens=True).strip()
        row = {
            "image": item.id,
            "picture": item.picture or item.id,
            "stack": plan.label,
            "question": item.question,
            "caption": caption,
            "tokens": min(len(ids) + 1, out.shape[1]),
        }
        row |= _objects(item, caption, tokenizer, ids) | item.truth
        told = [value[i] for value in record.values() if isinstance(value, list) and isinstance(value[i], dict)]
        row["prunes"] = [
            {"step": p["step"], "votes": sum(p["votes"]), "kept": len(p["kept"][0])}
            for t in told
            for p in t.get("prunes", [])
        ]
        row["rollbacks"] = [back for t in told for back in t.get("rollbacks", [])]
        for kept in [t["row"] for t in told if "row" in t]:
            row |= kept
        for curve in [t["attention"] for t in told if "attention" in t][:1]:
            row["attention"] = [round(v, 7) for v in curve[: row["tokens"]].mean(-1).tolist()]
        rows.append(row)
    return rows, seconds


def spoken(model, ids: list[int]) -> list[int]:
    """New tokens of a row up to the one that ends it, if any."""
    eos = model.generation_config.eos_token_id
    ends = set() if eos is None else set(torch.as_tensor(eos).flatten().tolist())
    return ids[: next((j for j, t in enumerate(ids) if t in ends), len(ids))]


def _objects(item: Item, caption: str, tokenizer, ids: list[int]) -> dict:
    """What the caption names: every mention with its words, place in the text and generated token."""
    scored = chair.score(caption, item.objects or [])
    lengths = [len(tokenizer.decode(ids[: j + 1], skip_special_tokens=True).strip()) for j in range(len(ids))]
    mentions = [
        {
            "words": m.words,
            "object": m.category,
            "start": m.start,
            "end": m.end,
            "token": next((j for j, n in enumerate(lengths) if n > m.start), len(ids) - 1),
        }
        for m in scored.mentions
    ]
    return {
        "objects": item.objects,
        "mentions": mentions,
        "hallucinated": sorted(scored.hallucinated) if item.names else None,
    }


def measure(task: Task, found: dict[str, list[dict]]) -> dict[str, dict]:
    """A task's metrics of each stack with intervals, speed, prunes, and the paired difference from the first stack.

    Args:
        found: rows by label; what not all of them have is left out of the metrics.
    """
    by = {label: {row["image"]: row for row in task.scored(rows)} for label, rows in found.items()}
    first, *others = by
    ids = [i for i in by[first] if all(i in by[label] for label in others)]
    groups = [by[first][i]["picture"] for i in ids]
    tables = {label: task.counts([by[label][i] for i in ids]) for label in by}
    out = {}
    for label, rows in found.items():
        seconds = sum(r["seconds"] for r in rows)
        out[label] = bootstrap.summary(tables[label], task.rates, groups) | {
            "pictures": len(set(groups)),
            "tokens_per_second": sum(r["tokens"] for r in rows) / seconds if seconds else 0.0,
            "prunes": sum(len(r["prunes"]) for r in rows) / max(1, len(rows)),
            "rollbacks": sum(len(r["rollbacks"]) for r in rows) / max(1, len(rows)),
        }
        if label != first and ids:
            out[label]["difference"] = bootstrap.difference(tables[label], tables[first], task.rates, groups)
    return out
