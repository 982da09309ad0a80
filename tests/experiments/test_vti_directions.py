"""The command that makes VTI's directions: of rendered scenes, and of a file of one's own."""

import io
import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open

from baselines import VTI
from baselines.vti_directions import Directions, load
from decoders import Stack
from experiments import models
from experiments.inputs.errors import InputError
from experiments.metrics import chair
from experiments.runner import setup
from experiments.scenes import world
from experiments.scenes.language import CAPTION_PROMPT, caption
from experiments.tools import demonstrations, vti_directions


def test_hallucinated_captions_differ_in_objects_alone():
    for one in demonstrations.draw(20, seed=1):
        there = set(one.picture.source.objects)
        true, told = ({m.category for m in chair.mentions(text)} for text in (one.true, one.hallucinated))
        assert true <= there and told - there and len(told) == len(true)
        assert len(re.findall(r"[.,]", one.true)) == len(re.findall(r"[.,]", one.hallucinated))
        assert one.true == caption(one.picture.source)


def test_most_of_what_is_put_in_is_usual_there():
    scenes = [world.draw("train", "typical", i) for i in range(60)]
    new = [(s, name) for s in scenes if s.objects for name in set(demonstrations.exchange(s).objects) - set(s.objects)]
    assert sum(name in world.usual(s.kind) for s, name in new) > 0.8 * len(new) > 40


def test_directions_of_scenes_steer_the_embedded_model(tmp_path):
    file = tmp_path / "folder" / "directions.safetensors"
    assert vti_directions.main([f"out={file}", "count=3", "trials=2"]) == 0
    found = load(file)
    assert found.shapes == dict(l=8, d=256, L=5, P=197, d_v=160)
    with safe_open(file, "pt") as data:
        told = data.metadata()
    assert told["count"] == "3" and told["seed"] == "42" and told["model"] == "experiments/scenes/model"
    model, processor = models.load(models.entry("scenes"))
    inputs = models.encode(processor, [world.render(world.draw("test", "typical", 0))], CAPTION_PROMPT, model.device)
    said = [
        Stack(stack).generate(model, **inputs, max_new_tokens=25, do_sample=False) for stack in ([], [VTI(file, 3, 3)])
    ]
    assert said[0].tolist() != said[1].tolist()


@pytest.fixture
def lines(tmp_path):
    """A file of four demonstrations, and its rows."""
    rows = []
    for i, one in enumerate(demonstrations.draw(4)):
        one.picture.open().save(tmp_path / f"{i}.png")
        rows.append(
            {
                "image": f"{i}.png",
                "value": one.true,
                "h_value": one.hallucinated,
                "question": f"What is in picture {i}?",
            }
        )
    file = tmp_path / "demos.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file, rows


def test_a_file_of_ones_own_is_read(lines, tmp_path):
    file, rows = lines
    found = demonstrations.read(str(file), 10)
    assert [one.question for one in found] == [row["question"] for row in rows]
    drawn = {tuple(one.question for one in demonstrations.read(str(file), 2, seed)) for seed in range(12)}
    assert len(drawn) > 3 and all(len(set(questions)) == 2 for questions in drawn)
    out = tmp_path / "out.safetensors"
    assert vti_directions.main([f"demos={file}", f"out={out}", "alpha_image=0"]) == 0
    assert load(out).vision is None
    assert vti_directions.main([f"demos={file}", f"out={out}", "count=2", "trials=1", "places=published"]) == 0
    assert load(out).vision is not None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": "none.png"}, "line 1, names a picture that is not there: '.*none.png'"),
        ({"value": 3}, "line 1, should have text as value"),
        ({"value": "a cat", "h_value": "a cat"}, "value and h_value are the same"),
        ({"question": None}, "line 1, should have text as question"),
    ],
)
def test_lines_that_are_not_so_are_refused(lines, change, words):
    file, rows = lines
    file.write_text(json.dumps(rows[0] | change))
    with pytest.raises(InputError, match=words):
        demonstrations.read(str(file), 2)
    file.write_text("{")
    with pytest.raises(InputError, match="line 1, is no JSON"):
        demonstrations.read(str(file), 2)
    file.write_text(json.dumps({"image": "0.png"}))
    with pytest.raises(InputError, match="line 1, lacks value, h_value, question"):
        demonstrations.read(str(file), 2)


@pytest.mark.parametrize(
    "words, told",
    [
        (["cont=3"], "Unknown option 'cont'. Did you mean 'count'"),
        (["count"], "Unknown option|Write it as option=value"),
        (["count=x"], "could not be converted to Integer"),
        (["count=1"], "count is at least 2"),
        (["trials=0"], "trials is at least 1"),
        (["share=1.5"], "share is more than 0 and at most 1"),
        (["places=mine"], "Unknown places 'mine'"),
        (["model=llav"], "Unknown model 'llav'"),
        (["model.pth=x"], "Unknown option 'model.pth'"),
    ],
)
def test_options_that_are_not_so_are_refused(words, told):
    with pytest.raises(InputError, match=told):
        vti_directions.parse(words)


NARROW = {
    "text_config": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    ),
    "vision_config": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
}
NARROW_QWEN = {
    "text_config": {**NARROW["text_config"], "rope_parameters": {"mrope_section": [2, 3, 3]}},
    "vision_config": dict(
        hidden_size=32, intermediate_size=64, depth=2, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]
    ),
}


@pytest.mark.parametrize(
    "name, figures, vision",
    [
        ("llava_next_vicuna_7b", NARROW, dict(L=2, P=577, d_v=32)),  # whose pictures are tiles
        ("qwen25vl_3b", NARROW_QWEN, dict(L=0, P=0, d_v=0)),  # whose pictures have any number of places
    ],
)
def test_families_get_the_directions_that_they_can_have(name, figures, vision):
    options, config = vti_directions.parse([f"model={name}", "model.weights=random", "count=2", "trials=1"])
    config.update(dtype="float32", device="cpu")
    config.random.config = OmegaConf.merge(OmegaConf.to_container(config.random.config), figures)
    model, processor = models.load(config)
    told = Console(record=True, file=io.StringIO(), width=200)
    made = vti_directions.make(model, processor, options, models.template(config), told)
    assert made.shapes == dict(l=3, d=64, **vision)
    assert ("at their own resolution: no directions of its vision tower" in told.export_text()) == (not vision["L"])
    decoder = VTI(made, alpha_image=0.9 if vision["L"] else 0)
    assert Stack([decoder]).refusals(model) == {"vti": None}


def test_an_answer_stands_behind_the_prompt():
    _, processor = models.load(models.entry("scenes"))
    picture = world.render(world.draw("train", "typical", 0))
    prompt = models.encode(processor, [picture], CAPTION_PROMPT, torch.device("cpu"))
    both = vti_directions.with_answer(prompt, processor.tokenizer, "There is a cat.")
    start = prompt["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][:, :start], prompt["input_ids"])
    assert processor.tokenizer.decode(both["input_ids"][0, start:]) == "There is a cat."
    assert both["attention_mask"].shape == both["input_ids"].shape


def test_a_run_is_another_where_the_file_holds_other_directions(tmp_path, composed):
    file = tmp_path / "directions.safetensors"

    def kept(*words: str) -> dict:
        return setup.settings(composed(*words))

    words = ["decoder=[vti]", f"decoder.vti.directions={file}"]
    Directions(torch.ones(2, 3)).save(file)
    found = [kept(*words), kept(*words)]
    Directions(-torch.ones(2, 3)).save(file)
    assert found[0] == found[1] != kept(*words) and list(found[0]["files"]) == ["vti.directions"]
    assert "files" not in kept("decoder=[vti]") and "files" not in kept("decoder=[vcd]")
