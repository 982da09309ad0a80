"""Captions of many pictures: what is done when the device has not the memory for a batch."""

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import families

from decoders import Decoder, Stack
from experiments import models
from experiments.cli import display
from experiments.inputs.errors import InputError
from experiments.results import Results
from experiments.runner import generate
from experiments.tasks import Files, Item, Scenes


@dataclass
class Hungry(Decoder):
    """Runs out of memory with more than `rows` rows."""

    rows: int

    def init_state(self, context):
        tried.append(context.rows)
        if context.rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")


tried: list[int] = []


def _describe(folder: Path, rows: int, count: int, missing: Path | None = None):
    tried.clear()
    model, processor = models.load(models.entry("scenes"))
    items = [*Scenes("validation", "typical", 0, count).items(), *([Item("broken", None, missing)] if missing else [])]
    plan = generate.Plan("[hungry]", Stack([Hungry(rows)]))
    store, out = Results(folder / "results.sqlite"), Console(file=io.StringIO(), width=200)
    kept = store.open(plan.label, {})
    speaker = generate.Speaker(
        model, processor, "Please describe this image in detail.", dict(max_new_tokens=4), out, 8
    )
    unreadable = generate.describe(speaker, plan, items, store, kept)
    return [row["image"] for row in store.rows(kept)], [item.id for item in items], unreadable, out.file.getvalue()


def test_out_of_memory_halves_the_batch_aloud_and_loses_nothing(tmp_path):
    done, ids, unreadable, said = _describe(tmp_path, 3, 7, tmp_path / "none.png")
    assert done == ids[:-1] and unreadable == ["broken"]
    assert tried == [7, 4, 2, 2, 2, 1]
    assert said.count("skipped broken") == 1
    assert "going on with batch_size=4" in said and "going on with batch_size=2" in said


def test_out_of_memory_with_one_image_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="out of memory with one image at a time .*model.quantization=4bit"):
        _describe(tmp_path, 0, 2)
    assert tried == [2, 1]


def test_a_picture_that_the_processor_does_not_take_is_named_and_the_others_go_on(tmp_path):
    """Qwen's processors take no picture that is over 200 times longer than high."""
    (tmp_path / "pictures").mkdir()
    for i, size in enumerate(((40, 32), (400, 1), (32, 40))):
        families.picture(i, *size).save(tmp_path / "pictures" / f"{i}.png")
    model, processor = families.model("qwen2_5_vl"), families.processor("qwen2_5_vl")
    out, store = Console(file=io.StringIO(), width=200), Results(tmp_path / "store/results.sqlite")
    kept, template = store.open("[]", {}), "{images:<|vision_start|><|image_pad|><|vision_end|>}{prompt}"
    speaker = generate.Speaker(model, processor, "w30 w31", dict(max_new_tokens=4), out, 8, template=template)
    unreadable = generate.describe(
        speaker, generate.Plan("[]", Stack([])), Files(str(tmp_path / "pictures")).items(), store, kept
    )
    assert unreadable == ["1.png"] and [row["image"] for row in store.rows(kept)] == ["0.png", "2.png"]
    assert "skipped 1.png: the processor Qwen2_5_VLProcessor takes no such pictures" in out.file.getvalue()


def test_a_batch_that_was_cut_short_is_drawn_again_as_a_whole(tmp_path):
    """Under sampling an answer depends on the rows beside it, so a run that goes on must end like one that was never
    stopped.
    """
    model, processor = models.load(models.entry("scenes"))
    items = Scenes("validation", "typical", 0, 6).items()
    speaker = generate.Speaker(
        model,
        processor,
        "Please describe this image in detail.",
        dict(max_new_tokens=12, do_sample=True, top_k=0),
        Console(file=io.StringIO()),
        4,
    )
    plan, store = generate.Plan("[]", Stack([])), Results(tmp_path / "results.sqlite")
    whole, part = store.open("[]", {"run": "whole"}), store.open("[]", {"run": "part"})
    generate.describe(speaker, plan, items, store, whole)
    said = [row["caption"] for row in store.rows(whole)]
    store.add(part, store.rows(whole, [items[1].id]))
    generate.describe(speaker, plan, items, store, part)
    assert [row["caption"] for row in store.rows(part, [i.id for i in items])] == said
    assert len(set(said)) > 1


def test_questions_are_asked_item_by_item(tmp_path):
    model, processor = models.load(models.entry("scenes"))
    scene = Scenes("validation", "typical", 0, 1).items()[0]
    items = [
        Item(f"{scene.id} {k}", scene.objects, scene.source, q, scene.id, {"label": "no"})
        for k, q in enumerate(("Is there a boat in this image?", "List the objects in this image."))
    ]
    store = Results(tmp_path / "results.sqlite")
    kept = store.open("[]", {})
    generate.describe(
        generate.Speaker(
            model,
            processor,
            "Please describe this image in detail.",
            dict(max_new_tokens=20),
            Console(file=io.StringIO()),
        ),
        generate.Plan("[]", Stack([])),
        items,
        store,
        kept,
    )
    no, listed = store.rows(kept)
    assert no["caption"].startswith("No") and listed["caption"].count(",") > 1
    assert (
        no["label"] == "no"
        and no["picture"] == listed["picture"] == scene.id
        and no["question"] == "Is there a boat in this image?"
    )


def test_a_no_claims_to_see_nothing():
    """What a right "no" names is not hallucinated, nor what a wrong one does in the picture."""
    _, processor = models.load(models.entry("scenes"))
    told = "No, there is no dog in the image."
    ids = processor.tokenizer(told).input_ids
    for truth, expected in (({}, ["dog"]), ({"label": "no"}, None)):
        row = generate._objects(Item("a", ["cat"], Path("a"), truth=truth), told, processor.tokenizer, ids)
        assert row["hallucinated"] == expected and [m["object"] for m in row["mentions"]] == ["dog"]
        assert [span.style for span in display.caption({"caption": told} | row).spans] == [
            "bold red" if expected else "cyan"
        ]


def said(caption, *mentions, hallucinated=("fork",)):
    places = [{"object": o, "start": caption.index(w), "end": caption.index(w) + len(w)} for o, w in mentions]
    row = {"caption": caption, "mentions": places, "hallucinated": None if hallucinated is None else [*hallucinated]}
    return row | {"image": "a", "objects": ["cup"], "question": None}


def printed(row, **screen):
    console = Console(record=True, width=100, file=io.StringIO(), **screen)
    display.captions(console, {"[]": [row]}, 1)
    return console.file.getvalue()


def test_hallucinated_words_are_marked_by_text_where_there_is_no_colour():
    row = said("Two forks and a cup by a fork.", ("fork", "forks"), ("cup", "cup"), ("fork", "fork."))
    for screen in ({}, {"force_terminal": True, "no_color": True}):
        out = printed(row, **screen)
        assert "Two [forks] and a cup by a [fork.]" in out and out.count("[word]: an object that is not in") == 1
    assert "Two forks and a cup by a fork." in printed(row | {"hallucinated": None})  # nobody knows what is there
    assert "[word]" not in printed(row | {"hallucinated": None})
    coloured = printed(row, force_terminal=True, color_system="standard", no_color=False)
    assert "[word]" not in coloured and "[forks]" not in coloured and "\x1b[1;31mforks" in coloured


def test_answers_stuck_on_one_word_are_counted_in_one_line():
    def warned(**captions):
        console = Console(record=True, width=200, file=io.StringIO())
        rows = {label: [{"image": f"p{i}", "caption": c} for i, c in enumerate(all)] for label, all in captions.items()}
        display.repeated(console, {f"[{label}]": found for label, found in rows.items()})
        return console.file.getvalue()

    stuck, fine = "A carrot carrot Carrot, carrot carrot.", "a cup and a cup, a cup. carrot carrot carrot carrot"
    assert warned(vista=[fine], plain=[fine, ""]) == ""
    out = warned(plain=[fine], vista=[fine, stuck, stuck], deco=[stuck])
    assert out.startswith(
        "2 of 3 answers of [vista], 1 of 1 answers of [deco] repeat one word 5 times in a row or more"
    )
    assert "(p1: 'carrot')" in out and out.count("\n") == 1
