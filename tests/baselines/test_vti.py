"""VTI and its directions against the method written out, the file that holds them, and what every decoder must keep."""

import copy
import re

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import plain, vti
from safetensors.torch import load_file, save_file
from stacks import directions

from baselines import VTI
from baselines.vti_directions import Directions, load, text_directions, vision_directions
from decoders import Stack, StackError, hf

FAMILIES = {"llava": 1.5, "qwen25vl": 0.0, "internvl": 1.5}  # and the strength in the vision tower

CLOSE = dict(atol=1e-4, rtol=1e-4)


def demonstrations(inputs: dict, count: int, seed: int) -> list[tuple[dict, dict]]:
    """Random answers, true and not, behind the prompt, each with a random picture."""
    generator = torch.Generator().manual_seed(seed)

    def answered(length: int, pixels: torch.Tensor) -> dict:
        said = torch.randint(20, 128, (1, length), generator=generator)
        ids = torch.cat([inputs["input_ids"], said], 1)
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)

    pixels = [torch.randn(1, 3, 32, 32, generator=generator).double() for _ in range(count)]
    return [(answered(4, one), answered(6, one)) for one in pixels]


def acting(family: str, **options) -> VTI:
    return VTI(directions(family), **dict(alpha_text=1.5, alpha_image=FAMILIES.get(family, 0.0)) | options)


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_directions_and_answers_equal_the_method_written_out(seed):
    model, inputs = plain.tiny(seed)
    demos = demonstrations(inputs, 4, seed)
    pictures = [true["pixel_values"][0] for true, _ in demos]
    vision = vision_directions(model, pictures, trials=3, seed=seed)
    torch.testing.assert_close(vision.double(), vti.vision_directions(model, pictures, trials=3, seed=seed), **CLOSE)
    with VTI(Directions(torch.zeros(4, 64), vision), alpha_text=0).encoding_context(model):
        text = text_directions(model, demos)
    with vti.seeing(model, vision, 0.9):
        torch.testing.assert_close(text.double(), vti.text_directions(model, demos), **CLOSE)
    unlike = text - text_directions(model, demos)
    assert unlike.abs().max() > 1e-2  # the vision tower was steered
    expected = plain.plain(model, inputs, 14)
    for strengths in (
        dict(),
        dict(alpha_text=4.0, alpha_image=0),
        dict(alpha_text=0, alpha_image=5.0),
        dict(alpha_text=2.0, alpha_image=2.0),
    ):
        oracle = vti.oracle(model, inputs, 14, text=text, vision=vision, **strengths)
        out = Stack([VTI(Directions(text, vision), **strengths)]).generate(
            model, **inputs, max_new_tokens=14, do_sample=False
        )
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == oracle
        assert oracle != expected


@pytest.mark.parametrize("options", [dict(by_place=True, share=0.5, seed=3), dict(by_place=False)], ids=str)
@torch.no_grad()
def test_vision_directions_equal_the_method_written_out(options):
    model, _ = plain.tiny(1)
    pictures = list(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double())
    ours = vision_directions(model, pictures, trials=12, **options)  # more than run together
    by_token = options.pop("by_place")
    theirs = vti.vision_directions(model, pictures, trials=12, by_token=by_token, **options)
    torch.testing.assert_close(ours.double(), theirs, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_setting_changes_nothing(family):
    checks.assert_asks_for_nothing(VTI(alpha_text=0, alpha_image=0), family)


def seen(family: str, decoders: list) -> torch.Tensor:
    """What the vision tower's last block made, while the decoders described a picture and afterwards, [2, ...]; of
    weights so large that every family's is not about 0.
    """
    found, model, inputs = [], copy.deepcopy(tiny.model(family)), tiny.inputs(family)
    torch.manual_seed(1)
    for weight in hf.vision_tower(model).parameters():
        torch.nn.init.normal_(weight, std=0.3)
    hf.vision_blocks(model)[-1].register_forward_hook(lambda *args: found.append(hf.first_of(args[-1])))
    for stack in (decoders, []):
        Stack(stack).generate(model, **inputs, max_new_tokens=2, do_sample=False)
    return torch.stack(found)


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "instructblip"])
def test_the_vision_tower_is_steered_and_left_as_it_was(family):
    """Tiles are pictures; InstructBLIP's tower is outside the model that is decoded."""
    before, _ = seen(family, [])
    during, after = seen(family, [acting(family, alpha_text=0, alpha_image=1.0)])
    assert not torch.allclose(during, before, atol=0.1) and torch.equal(after, before)
    assert torch.equal(seen(family, [acting(family, alpha_image=0)])[0], before)


def test_directions_of_another_number_of_places_are_refused():
    inputs, found = tiny.inputs("llava"), directions("llava")
    before = checks.run("llava", [], inputs)[0].scores[0]
    wrong = VTI(Directions(found.text, found.vision[:, :9]))
    assert "P=9 places of a picture, and LlavaFor" in Stack([wrong]).refusals(tiny.model("llava"))["vti"]
    with pytest.raises(StackError, match="P=9 places of a picture, and LlavaFor.* into 16 patches; make its own"):
        checks.run("llava", [wrong], inputs)
    assert torch.equal(checks.run("llava", [], inputs)[0].scores[0], before)
    found = directions("internvl")  # whose tower takes several sizes, so that the picture tells
    wrong = VTI(Directions(found.text, found.vision[:, :9]))
    assert Stack([wrong]).refusals(tiny.model("internvl")) == {"vti": None}
    with pytest.raises(StackError, match="of 9 places of a picture, and this one has 65; make them for"):
        checks.run("internvl", [wrong], tiny.inputs("internvl"))


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_models_of_native_resolution_are_refused_by_name(family):
    model, given = tiny.model(family), VTI(directions(family))
    name = type(model).__name__
    assert f"{name} sees pictures at their own resolution" in Stack([given]).refusals(model)["vti"]
    with pytest.raises(StackError, match=f"{name} sees pictures at their own resolution.*alpha_image=0"):
        checks.run(family, [given], tiny.inputs(family))
    with pytest.raises(StackError, match=f"{name} sees pictures"):
        vision_directions(model, [torch.zeros(3, 8, 8)] * 2)
    assert Stack([acting(family, alpha_image=0)]).refusals(model) == {"vti": None}


def test_directions_of_another_model_are_refused():
    model, found = tiny.model("llava"), directions("llava")
    for wrong, words in (
        (Directions(found.text[:2], found.vision), "l=2 blocks of width d=48, LlavaFor.* has l=3 of d=48"),
        (Directions(found.text[:, :40], found.vision), "l=3 blocks of width d=40, LlavaFor.* has l=3 of d=48"),
        (Directions(found.text, found.vision[:1]), "L=1 blocks of width d_v=32, that of LlavaFor.* has L=2 of d_v=32"),
        (Directions(found.text, found.vision[..., :8]), "L=2 blocks of width d_v=8, that of LlavaFor"),
        (Directions(found.text), "no directions of a vision tower; alpha_image=0 steers the text alone"),
    ):
        with pytest.raises(StackError, match=words):
            checks.run("llava", [VTI(wrong)], tiny.inputs("llava"))
        assert re.search(words, Stack([VTI(wrong)]).refusals(model)["vti"])


def test_a_tower_outside_the_model_that_is_decoded_is_checked_before_anything_runs():
    found, model = directions("instructblip"), tiny.model("instructblip")
    for wrong, words in (
        (found.vision[:1], "L=1 blocks"),
        (found.vision[..., :8], "d_v=8"),
        (found.vision[:, :9], "P=9"),
    ):
        why = Stack([VTI(Directions(found.text, wrong))]).refusals(model)["vti"]
        assert why is not None and words in why and "InstructBlip" in why
    assert Stack([VTI(found)]).refusals(model) == {"vti": None}


def test_generate_that_encodes_pictures_before_the_stack_is_refused():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    with pytest.raises(StackError, match=r"vti steers the vision tower, which only stack\.generate"):
        model.generate(**inputs, custom_generate=Stack([acting("llava")]), max_new_tokens=2)
    model.generate(**inputs, custom_generate=Stack([acting("llava", alpha_image=0)]), max_new_tokens=2)


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_a_file_holds_the_directions_their_shapes_and_checksum(family, tmp_path):
    found, file = directions(family), tmp_path / "folder" / "directions.safetensors"
    found.save(file, {"model": "tiny"})
    again = load(file)
    assert torch.equal(again.text, found.text) and again.checksum == found.checksum
    assert (again.vision is None) == (found.vision is None) and again.shapes == found.shapes
    assert again.shapes == dict(l=3, d=48, **(dict(L=2, P=17, d_v=32) if family == "llava" else dict(L=0, P=0, d_v=0)))
    inputs, strengths = tiny.inputs(family), dict(alpha_text=1.5, alpha_image=FAMILIES[family])
    one, two = (checks.run(family, [VTI(x, **strengths)], inputs)[0].scores[0] for x in (found, file))
    assert torch.equal(one, two)
    Directions(-found.text, found.vision).save(file)  # a file that has changed is read again
    assert load(file).checksum != found.checksum


def test_a_decoder_whose_file_has_changed_goes_by_the_new_one(tmp_path):
    found, file, inputs = directions("qwen25vl"), tmp_path / "directions.safetensors", tiny.inputs("qwen25vl")
    found.save(file)
    decoder = VTI(file, alpha_text=1.5, alpha_image=0)
    before = checks.run("qwen25vl", [decoder], inputs)[0].scores[0]
    Directions(-found.text).save(file, {"told": "so that its size is another"})
    after = checks.run("qwen25vl", [decoder], inputs)[0].scores[0]
    assert not torch.allclose(before, after, atol=1e-2)


def test_files_that_are_not_so_are_refused(tmp_path):
    file, found = tmp_path / "directions.safetensors", directions("llava")
    found.save(file)
    tensors, place = load_file(file), str(file)
    shapes = {name: str(size) for name, size in found.shapes.items()}
    whole = {"format": "vti directions 1", "sha256": found.checksum, **shapes}
    for number, (held, metadata, words) in enumerate(
        (
            (tensors, whole | {"sha256": "0" * 64}, "is damaged: its numbers do not have its checksum; make it anew"),
            ({"text": tensors["text"]}, whole, "do not have its checksum"),
            ({"vision": tensors["vision"]}, whole, "do not have its checksum"),
            (tensors, whole | {"P": "16"}, "is damaged: it holds .*, its metadata say"),
            (tensors, {}, "holds no directions .* format None, not 'vti directions 1'.*; make some: python -m"),
        )
    ):
        place = tmp_path / f"{number}.safetensors"
        save_file(held, place, metadata)
        with pytest.raises(StackError, match=f"vti: '{place}' {words}" if words.startswith(("is", "h")) else words):
            load(place)
    file.write_bytes(b"no safetensors")
    with pytest.raises(StackError, match="cannot be read as safetensors"):
        load(file)
    with pytest.raises(StackError, match="vti: there is no file of directions '/no/such'; make one: python -m"):
        VTI("/no/such").requirements(tiny.model("llava"))
    assert "directions is the file of this model's directions" in Stack([VTI()]).refusals(tiny.model("llava"))["vti"]


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha_text=-1), "vti: alpha_text is a number >= 0, not -1; the nearest valid value is 0"),
        (dict(alpha_image="0.9"), "vti: alpha_image is a number >= 0"),
        (dict(directions=3), "directions is the name of a file, or Directions, not 3"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        VTI(**bad)


def test_one_demonstration_makes_no_directions():
    model, inputs = plain.tiny()
    with pytest.raises(StackError, match="at least two demonstrations, not of 1"):
        text_directions(model, demonstrations(inputs, 1, 0))
    with pytest.raises(StackError, match="at least two demonstrations, not of 1"):
        vision_directions(model, [torch.zeros(3, 32, 32)])
