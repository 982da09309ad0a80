"""The embedded model is a LLaVA like any other, small enough to ship, and sees what it describes."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from decoders import Stack
from experiments import models
from experiments.metrics import chair
from experiments.scenes import world
from experiments.scenes.language import CAPTION_PROMPT
from prunehal import PruneHal


@pytest.fixture(scope="module")
def loaded():
    return models.load(models.entry("scenes"))


def _inputs(loaded, count):
    model, processor = loaded
    return models.encode(
        processor, [world.render(world.draw("test", "typical", i)) for i in range(count)], CAPTION_PROMPT, model.device
    )


def test_it_is_a_llava(loaded):
    model, processor = loaded
    assert isinstance(model, LlavaForConditionalGeneration) and isinstance(processor, LlavaProcessor)
    assert (_inputs(loaded, 1)["input_ids"] == model.config.image_token_id).sum() >= 196
    assert model.config.text_config.num_hidden_layers >= 8
    assert sum(f.stat().st_size for f in (Path(models.ROOT) / "experiments/scenes/model").iterdir()) <= 16 * 2**20


def test_it_sees(loaded):
    model, processor = loaded
    inputs = _inputs(loaded, 30)
    out = Stack([]).generate(model, **inputs, max_new_tokens=150, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    truth = [world.draw("test", "typical", i).objects for i in range(30)]
    right = chair.summary([chair.score(t, o) for t, o in zip(texts, truth, strict=False)])["recall"]["value"]
    wrong = chair.summary([chair.score(t, truth[(i + 7) % 30]) for i, t in enumerate(texts)])["recall"]["value"]
    assert right > 50 and right > 2 * wrong


@pytest.mark.parametrize(
    "options",
    [dict(do_sample=False), dict(do_sample=False, stop_strings=["."]), dict(do_sample=True, top_p=0.9)],
    ids=str,
)
def test_plain_decoding_equals_generate(loaded, options):
    model, processor = loaded
    inputs = _inputs(loaded, 3)
    torch.manual_seed(1)
    expected = model.generate(**inputs, max_new_tokens=60, **options, tokenizer=processor.tokenizer)
    torch.manual_seed(1)
    assert torch.equal(
        Stack([]).generate(model, **inputs, max_new_tokens=60, **options, tokenizer=processor.tokenizer), expected
    )


def test_pruning_gathers_attention(loaded):
    model, _ = loaded
    stack = Stack([PruneHal(r=0.4, t=1)])
    stack.generate(model, **_inputs(loaded, 8), max_new_tokens=20, do_sample=False)
    assert all(r["prunes"][0]["step"] == 2 and len(r["prunes"][0]["kept"][0]) == 78 for r in stack.record["prunehal"])
