"""VCD: traces of the official code, a two-model reference, and properties."""

import pytest
import tiny
import torch
from references import traces as golden

from baselines import VCD
from baselines.vcd import alpha_bar, noised
from decoders import Decoder, Stack, StackError

CASES = golden.trace("vcd")["cases"]
OPTIONS = dict(
    max_new_tokens=14,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
)


class _Keep(Decoder):
    """Notes the scores that reach it."""

    def init_state(self, context):
        return []

    def process_logits(self, step, state, scores):
        state.append(scores)
        return scores

    def record(self, state):
        return state


@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_trace(name, figures):
    case = CASES[name]
    s = case["settings"]
    distorted = golden.embeds(s["model"], s["prompt"], "prompt_cd")
    vcd = (
        []
        if s["images_cd"] is None
        else [
            VCD(
                alpha=s["cd_alpha"] if s["cd_alpha"] is not None else 0.5,
                beta=s["cd_beta"] if s["cd_beta"] is not None else 0.1,
                distort=lambda inputs: {"inputs_embeds": distorted},
            )
        ]
    )
    stack = Stack([*vcd, _Keep()])
    out = stack.generate(
        golden.model(s["model"]),
        inputs_embeds=golden.embeds(s["model"], s["prompt"]),
        max_new_tokens=s["max_new_tokens"],
        do_sample=True,
        top_k=1,
        temperature=s["temperature"],
        eos_token_id=s["eos_token_id"],
        pad_token_id=0,
    )
    scores = stack.record["_keep"]
    assert out[0].tolist() == case["tokens"]
    assert [int((x > -torch.inf).sum()) for x in scores] == case["kept_per_step"]
    worst = 0.0
    for mine, step in zip(scores, case["steps"], strict=False):
        top = step["processed_top10"]
        torch.testing.assert_close(mine[0, top["ids"]], torch.tensor(top["values"]), atol=1e-4, rtol=1e-5)
        worst = max(worst, float((mine[0, top["ids"]] - torch.tensor(top["values"])).abs().max()))
    figures(
        "vcd", name, f"{len(scores)} tokens, kept counts, {len(case['steps'])} steps' scores", f"scores {worst:.1e}"
    )


def test_schedule_and_noise_equal_the_official_ones():
    trace = golden.trace("vcd")
    for t, values in trace["noise_schedule"].items():
        kept = alpha_bar()[int(t)]
        assert float(kept) == pytest.approx(values["alpha_bar"], rel=1e-5)
        assert float(kept.sqrt()) == pytest.approx(values["sqrt_alpha_bar"], rel=1e-5)
        assert float((1 - kept).sqrt()) == pytest.approx(
            values["sqrt_one_minus_alpha_bar"], rel=2e-3 if int(t) < 2 else 1e-5
        )
    example = trace["noise_example"]
    image = torch.tensor(example["image"])
    eps = torch.tensor(example["eps"])
    for t, expected in example["noisy"].items():
        torch.testing.assert_close(noised(image, eps, int(t)), torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen25vl", "instructblip", "llava_next"])
def test_equals_two_generations_side_by_side(family, beams):
    """The contrast of two models, each with a cache of its own, run by hand along the tokens that were picked."""
    inputs, vcd = tiny.inputs(family, 2), VCD(alpha=0.8, beta=0.05)
    stack = Stack([vcd, _Keep()])
    out = stack.generate(tiny.model(family), **inputs, **OPTIONS)
    answer = out.sequences[:, -14:]
    both = []
    for given in (inputs, {**inputs, **vcd.distorted(inputs, [0, 0], tiny.model(family).config)}):
        forced = _Forced(answer)
        both.append(torch.stack(Stack([forced]).generate(tiny.model(family), **given, **OPTIONS).logits))
    plain, distorted = both
    expected = 1.8 * plain - 0.8 * distorted
    expected[plain < plain.amax(-1, keepdim=True) + torch.log(torch.tensor(0.05))] = -torch.inf
    got = torch.stack(stack.record["_keep"])
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=1e-3)
    # InstructBLIP's tiny random Q-Former hardly looks at the picture
    assert (plain - distorted).abs().max() > (1e-7 if family == "instructblip" else 0.1)


class _Forced(Decoder):
    """Makes the answer the one given."""

    def __init__(self, answer):
        self.answer = answer

    def process_logits(self, step, state, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self.answer[:, step.max_num_forwards - 1 : step.max_num_forwards], 0.0)


@pytest.mark.parametrize("distortion", ["noise", "blank", "mean", "blur"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_distortions_change_the_picture_alone_and_are_the_same_in_a_batch(family, distortion):
    batch, vcd = tiny.inputs(family, 3), VCD(distortion=distortion)
    seeds, config = [5, 6, 7], tiny.model(family).config
    whole = vcd.distorted(batch, seeds, config)
    assert set(whole) == {"pixel_values"} and whole["pixel_values"].shape == batch["pixel_values"].shape
    assert not torch.equal(whole["pixel_values"], batch["pixel_values"])
    for i in range(3):
        single = tiny.one(batch, i)
        alone = vcd.distorted(single, seeds[i : i + 1], config)["pixel_values"]
        share = len(whole["pixel_values"]) // 3
        torch.testing.assert_close(whole["pixel_values"][i * share : (i + 1) * share], alone)
    if distortion == "noise":
        assert not torch.equal(vcd.distorted(batch, [5, 6, 8], config)["pixel_values"], whole["pixel_values"])


def test_mean_and_blur_of_patches_are_those_of_the_picture():
    """A picture cut into Qwen-VL's patches is smoothed as the whole picture is."""
    from einops import rearrange

    torch.manual_seed(0)
    config = tiny.model("qwen25vl").config
    picture = torch.randn(1, 3, 32, 32)
    patches = rearrange(
        picture.expand(2, -1, -1, -1),
        "(t s) c (h m1 p1) (w m2 p2) -> (t h w m1 m2) (c s p1 p2)",
        s=2,
        m1=2,
        m2=2,
        p1=4,
        p2=4,
    )
    inputs = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    for distortion in ("mean", "blur"):
        vcd = VCD(distortion=distortion, blur=0.1)
        whole = vcd.distorted({"pixel_values": picture}, [0])["pixel_values"]
        expected = rearrange(
            whole.expand(2, -1, -1, -1),
            "(t s) c (h m1 p1) (w m2 p2) -> (t h w m1 m2) (c s p1 p2)",
            s=2,
            m1=2,
            m2=2,
            p1=4,
            p2=4,
        )
        torch.testing.assert_close(vcd.distorted(inputs, [0], config)["pixel_values"], expected, atol=1e-5, rtol=1e-5)
    assert VCD(distortion="mean").distorted({"pixel_values": picture}, [0])["pixel_values"].std((-2, -1)).max() < 1e-5


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=str)
@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_neutral_settings_change_nothing(family, options):
    inputs = tiny.inputs(family, 2)
    plain = Stack([]).generate(tiny.model(family), **inputs, **OPTIONS | options)
    for vcd in (
        VCD(alpha=0, beta=0),
        VCD(alpha=0.7, beta=0, distort=lambda inputs: {}),
    ):  # the same picture twice: (1 + a) l - a l
        out = Stack([vcd]).generate(tiny.model(family), **inputs, **OPTIONS | options)
        assert torch.equal(out.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=2e-3, rtol=1e-4)
    acting = Stack([VCD(alpha=0.7, beta=0)]).generate(tiny.model(family), **inputs, **OPTIONS | options)
    assert not torch.equal(acting.sequences, plain.sequences)


def test_alpha_0_is_the_plausibility_constraint_alone():
    inputs = tiny.inputs("llava", 2)
    out = Stack([VCD(alpha=0, beta=0.3)]).generate(tiny.model("llava"), **inputs, **OPTIONS)
    for logits, scores in zip(out.logits, out.scores, strict=False):
        kept = logits.softmax(-1) >= 0.3 * logits.softmax(-1).amax(-1, keepdim=True)
        assert torch.equal(scores > -torch.inf, kept) and torch.equal(scores[kept], logits[kept])


@pytest.mark.parametrize("prunes", ["copied", "own"])
def test_a_batch_equals_its_images_one_by_one(prunes):
    batch = tiny.inputs("llava", 3)
    out = Stack([VCD(prunes=prunes)]).generate(tiny.model("llava"), **batch, seeds=[1, 2, 3], **OPTIONS)
    assert not any(map(torch.equal, out.scores, out.logits))
    for i in range(3):
        alone = Stack([VCD(prunes=prunes)]).generate(
            tiny.model("llava"), **tiny.one(batch, i), seeds=[i + 1], **OPTIONS
        )
        assert alone.sequences[0, -14:].tolist() == out.sequences[i, -14:].tolist()


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
@torch.no_grad()
def test_equals_two_plain_models_without_a_cache(family):
    """Whole forwards of transformers, one for each picture and token, and the contrast written out; the noise comes
    from outside.
    """
    model, inputs = tiny.model(family), tiny.inputs(family)
    noisy = inputs["pixel_values"] + 0.7 * torch.randn(inputs["pixel_values"].shape)
    ids, tokens, expected = inputs["input_ids"], [], []
    for _ in range(14):
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = (ids == tiny.IMAGE).long()
        plain, distorted = (
            model(**{**given, "pixel_values": pixels}, use_cache=False).logits[0, -1]
            for pixels in (inputs["pixel_values"], noisy)
        )
        scores = 2.2 * plain - 1.2 * distorted
        scores[plain.softmax(-1) < 0.02 * plain.softmax(-1).max()] = -torch.inf
        tokens.append(int(scores.argmax()))
        expected.append(scores)
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], 1)
    stack = Stack([VCD(alpha=1.2, beta=0.02, distort=lambda inputs: {"pixel_values": noisy}), _Keep()])
    out = stack.generate(model, **inputs, **OPTIONS)
    assert out.sequences[0, -14:].tolist() == tokens
    torch.testing.assert_close(torch.stack(stack.record["_keep"])[:, 0], torch.stack(expected), atol=5e-3, rtol=1e-3)


def test_pictures_are_told_apart_by_their_tokens():
    """InternVL's tiles of a prompt with three and of one with one: each prompt's noise is the one it has alone."""
    config, tiles = tiny.model("internvl").config, torch.randn(4, 3, 64, 64)
    ids = torch.full((2, 60), 30)
    ids[0, :48] = ids[1, :16] = tiny.IMAGE
    vcd = VCD()
    both = vcd.distorted({"pixel_values": tiles, "input_ids": ids}, [3, 4], config)["pixel_values"]
    alone = [
        vcd.distorted({"pixel_values": part, "input_ids": one[None]}, [seed], config)["pixel_values"]
        for part, one, seed in ((tiles[:3], ids[0], 3), (tiles[3:], ids[1], 4))
    ]
    assert torch.equal(both, torch.cat(alone))
    noise = both - tiles * alpha_bar()[500].sqrt()
    assert min(float((noise[i] - noise[j]).abs().max()) for i in range(4) for j in range(i)) > 0.1
    with pytest.raises(StackError, match="one at a time"):
        vcd.distorted({"pixel_values": tiles[:3], "input_ids": ids}, [3, 4])


def test_padding_tiles_change_no_draw():
    picture = torch.randn(1, 2, 3, 5, 5)  # an odd size, whose draw would depend on how many follow
    padded = torch.cat([picture, torch.zeros(1, 2, 3, 5, 5)], 1)
    for distortion in ("noise", "mean", "blur"):
        vcd = VCD(distortion=distortion)
        alone, beside = (vcd.distorted({"pixel_values": x}, [1])["pixel_values"] for x in (picture, padded))
        torch.testing.assert_close(beside[:, :2], alone)


def test_impossible_tokens_stay_impossible():
    scores = torch.tensor([[1.0, -torch.inf, 0.5], [2.0, 1.0, -torch.inf]])
    step = type("Step", (), {"branch": torch.tensor([[0.0, -torch.inf, 3.0], [1.0, 0.5, 0.0]])})
    for beta in (0, 0.01):
        out = VCD(alpha=1, beta=beta).process_logits(step, None, scores)
        torch.testing.assert_close(out, torch.tensor([[2.0, -torch.inf, -2.0], [3.0, 1.5, -torch.inf]]))


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(alpha=-1), ">= 0"),
        (dict(alpha=True), ">= 0"),
        (dict(beta=1.5), "in \\[0, 1\\]"),
        (dict(noise_step=True), "integer"),
        (dict(alpha=float("nan")), ">= 0"),
        (dict(noise_step=1000), "in \\[0, 999\\]"),
        (dict(distortion="nois"), "Did you mean 'noise'"),
        (dict(prunes="copy"), "Did you mean 'copied'"),
        (dict(blur=0), "> 0"),
        (dict(distort=3), "function"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        VCD(**bad)


def test_what_has_no_picture_is_refused():
    with pytest.raises(StackError, match="no picture"):
        Stack([VCD()]).generate(golden.model("A"), input_ids=golden.ids("A", 0), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(StackError, match="stack.generate"):
        tiny.model("llava").generate(**tiny.inputs("llava"), max_new_tokens=2, custom_generate=Stack([VCD()]))
