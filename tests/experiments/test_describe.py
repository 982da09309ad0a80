"""Captions of many pictures: what is done when the device has not the memory for a batch."""

import io
from dataclasses import dataclass
from pathlib import Path

import families
import pytest
import torch
from rich.console import Console

from decoders import Decoder, Stack
from experiments import data, describe, models
from experiments.errors import InputError


@dataclass
class Hungry(Decoder):
    """Runs out of memory with more than `rows` rows."""

    rows: int

    def start(self, run):
        tried.append(run.rows)
        if run.rows > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")


tried: list[int] = []


def _describe(folder: Path, rows: int, count: int, missing: Path | None = None):
    tried.clear()
    model, processor = models.load(models.entry("scenes"))
    items = [*data.scenes("validation", "typical", 0, count), *([data.Item("broken", None, missing)] if missing else [])]
    store, out = describe.Store(folder), Console(file=io.StringIO(), width=200)
    plan = describe.Plan("[hungry]", Stack([Hungry(rows)]))
    unreadable = describe.describe(model, processor, plan, items, store, "Please describe this image in detail.", 8, dict(max_new_tokens=4), 0, out)
    return [row["image"] for row in store.rows], [item.id for item in items], unreadable, out.file.getvalue()


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
    for i, size in enumerate(((40, 32), (400, 1), (32, 40))):
        families.picture(i, *size).save(tmp_path / f"{i}.png")
    model, processor = families.model("qwen2_5_vl"), families.processor("qwen2_5_vl")
    out, store = Console(file=io.StringIO(), width=200), describe.Store(tmp_path)
    items = list(data.files(str(tmp_path)))
    template = "{images:<|vision_start|><|image_pad|><|vision_end|>}{prompt}"
    unreadable = describe.describe(model, processor, describe.Plan("[]", Stack([])), items, store, "w30 w31", 8, dict(max_new_tokens=4), 0, out, template)
    assert unreadable == ["1.png"] and [row["image"] for row in store.rows] == ["0.png", "2.png"]
    assert "skipped 1.png: the processor Qwen2_5_VLProcessor takes no such pictures" in out.file.getvalue()
