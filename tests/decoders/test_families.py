"""Every family through every check: a tiny random model of its class, on what its own processor makes of pictures.

`--figures` prints what passed, family by check.
"""

from __future__ import annotations

import itertools
import math

import pytest
import stacks
import torch
from references.masked_prunehal import masked_prunehal
from tiny import families
from transformers import LogitsProcessor, LogitsProcessorList

from baselines import OPERA, VCD, DoLa
from decoders import Stack, StackError
from prunehal import PruneHal

NEW = 8
OPTIONS = dict(
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
    output_scores=True,
)
CLOSE = dict(atol=5e-3, rtol=1e-3)
PRUNEHAL = dict(
    r=0.6,
    t=3,
    reference="running_mean",
    timing="before",
    sets="per_layer",
    majority="strict",
    forced=True,
    forced_counts=True,
    keep="top",
    top_k=None,
    first_token=False,
)

ONE_PICTURE = "InstructBLIP takes one picture a prompt"
NOT_APPLICABLE = {
    ("instructblip", "two pictures"): ONE_PICTURE,
    ("instructblip", "one and two pictures"): ONE_PICTURE,
    **{
        (name, "video"): "takes no video"
        for name in ("llava", "llava_next", "llava_next_mistral", "gemma3", "aya_vision", "lfm2_vl")
    },
    ("instructblip", "video"): "InstructBLIP's videos are another class's",
    **{(name, "video"): "a video comes as pictures" for name in ("internvl", "smolvlm", "idefics3")},
}
# layers that keep one state of all tokens cannot run candidates beside each other, nor go back
REFUSED = {
    (name, check): "opera|restless"
    for name in ("qwen3_5", "lfm2_vl")
    for check in ("opera neutral", "opera", "opera+prunehal")
}


def every(check: str):
    """Parametrises a test over the families."""
    return pytest.mark.parametrize("name, check", [pytest.param(name, check, id=name) for name in families.NAMES])


@pytest.fixture(autouse=True)
def _cell(request, record_property):
    """What `--figures` shows of a test: family, check, and whether a refusal is what was tested. Skips what a family
    has not, with the reason.
    """
    cell = tuple(request.node.callspec.params[key] for key in ("name", "check"))
    record_property("cell", (*cell, cell in REFUSED or cell[0] in families.REFUSED))
    if cell in NOT_APPLICABLE:
        pytest.skip(NOT_APPLICABLE[cell])


def refused(name: str, check: str, decoders: list, **options) -> bool:
    """Whether the family refuses these decoders; if it ought to, it must, by name."""
    if (name, check) not in REFUSED:
        return False
    with pytest.raises(StackError, match=REFUSED[name, check]):
        Stack(decoders).generate(families.model(name), **prompts(name, 1), **OPTIONS | options)
    return True


SIZES = [(48, 32), (24, 64), (64, 32)]


def prompts(name: str, count: int, first: int = 0) -> dict:
    """A batch of prompts of different lengths with pictures of different sizes."""
    return batch(name, [families.prompt(i + 1, (4, 7, 5)[i], SIZES[i]) for i in range(first, first + count)])


def batch(name: str, written: list) -> dict:
    return families.inputs(name, [text for text, _ in written], [pictures for _, pictures in written])


def generate(name: str, decoders: list, inputs: dict, seeds=None, **options):
    """(output, record) of a stack."""
    stack = Stack(decoders)
    return stack.generate(families.model(name), **inputs, seeds=seeds, **OPTIONS | options), stack.record


def answer(out, new: int = NEW) -> torch.Tensor:
    """long [n, new]; what follows the prompt, which InstructBLIP does not return."""
    return out.sequences[:, -new:]


def close(mine, expected) -> None:
    torch.testing.assert_close(torch.stack(list(mine)), torch.stack(list(expected)), **CLOSE)


class Say(LogitsProcessor):
    """Makes transformers' own generate say these tokens, long [n, new]."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.at = tokens, 0

    def __call__(self, input_ids, scores):
        self.at += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[:, self.at - 1 : self.at], 0.0)


def said(name: str, inputs: dict, tokens: torch.Tensor, **options):
    """transformers' output along these tokens."""
    options = OPTIONS | dict(max_new_tokens=tokens.shape[1]) | options
    return families.model(name).generate(**inputs, **options, logits_processor=LogitsProcessorList([Say(tokens)]))


SEARCHES = {"greedy": {}, "sampling": dict(do_sample=True, temperature=1.3, top_k=0), "beam": dict(num_beams=3)}
GLM4V = ("greedy", "sampling")  # under beams transformers mixes up the pictures of one prompt, and loses videos


def same_as_generate(name: str, inputs: dict, searches=tuple(SEARCHES)) -> dict:
    """The outputs of the empty stack, by search."""
    found = {}
    for search in searches:
        if search == "beam" and families.mixed_up(inputs):
            continue
        options = OPTIONS | SEARCHES[search]
        torch.manual_seed(3)
        expected = families.model(name).generate(**inputs, **options)
        torch.manual_seed(3)
        found[search] = out = generate(name, [], inputs, **options)[0]
        assert torch.equal(out.sequences, expected.sequences), search
        close(out.logits, expected.logits)
    return found


@every("[] = generate")
def test_the_empty_stack_is_generate(name, check):
    """Greedy, sampling and beam search say what transformers' own generate says of three prompts, as does greedy search
    of one; all of them of one prompt with two pictures below.
    """
    same_as_generate(name, prompts(name, 1), ["greedy"])
    out = same_as_generate(name, prompts(name, 3))["greedy"]
    vary = min(len(set(row)) for row in answer(out).tolist()) > 2
    assert vary or families.OLD, "answers must vary for this test to mean anything"  # the weights of 5.17 are others


@every("pruned = masked")
def test_pruned_equals_masked(name, check):
    """Deleting slots is masking them: an independent run on transformers' own cache votes and prunes alike, and has the
    same logits. Only full-attention layers vote and prune.
    """
    inputs, layers = prompts(name, 1, 2), families.full(name)
    visual = families.visual(name, inputs)[0].nonzero().flatten().tolist()
    out, record = generate(name, [PruneHal(**PRUNEHAL)], inputs)
    prunes = record["prunehal"][0]["prunes"]
    assert (
        prunes and all(len(kept) < len(visual) for kept in prunes[0]["kept"]) and len(prunes[0]["kept"]) == len(layers)
    )

    def run(model, inputs, loop):
        model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, custom_generate=loop
        )

    tokens, logits, expected = masked_prunehal(run, families.model(name), inputs, visual, layers, NEW, PRUNEHAL)
    assert [(p["step"], p["kept"]) for p in prunes] == [(m, [kept[i] for i in layers]) for m, kept in expected]
    assert answer(out)[0].tolist() == tokens
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, **CLOSE)
    plain, _ = generate(name, [], inputs)
    assert not torch.allclose(plain.logits[2], out.logits[2], **CLOSE), "what was pruned must matter"


@every("vcd")
def test_vcd_is_two_runs(name, check):
    """Without weight VCD changes nothing; with it, the scores are the contrast of two of transformers' runs, on the
    picture and on the distorted one, whatever the distortion.
    """
    inputs = prompts(name, 2)
    plain, _ = generate(name, [], inputs)
    neutral, _ = generate(name, [VCD(alpha=0, beta=0)], inputs)
    assert torch.equal(plain.sequences, neutral.sequences)
    close(neutral.logits, plain.logits)
    vcd = VCD(alpha=1.0, beta=0)
    out, _ = generate(name, [vcd], inputs)
    tokens = answer(out)
    model = families.model(name)
    given, changed = (
        said(name, inputs, tokens),
        said(name, {**inputs, **vcd.distorted(inputs, [0, 0], model.config)}, tokens),
    )
    close(out.logits, given.logits)
    close(out.scores, [2 * one - other for one, other in zip(given.logits, changed.logits, strict=False)])
    # InstructBLIP's tiny random Q-Former hardly looks at the picture
    assert (given.logits[0] - changed.logits[0]).abs().max() > (1e-7 if name == "instructblip" else 0.05)
    for vcd in (VCD(beta=0, distortion=distortion) for distortion in ("blank", "mean", "blur")):
        if name == "lfm2_vl" and vcd.distortion != "blank":
            with pytest.raises(StackError, match="in an order that is not known"):
                generate(name, [vcd], inputs)
            continue
        out, _ = generate(name, [vcd], inputs, max_new_tokens=1)
        changed = said(name, {**inputs, **vcd.distorted(inputs, [0, 0], model.config)}, tokens[:, :1])
        close(out.scores[:1], [2 * given.logits[0] - changed.logits[0]])


@every("dola")
def test_dola_contrasts_the_hidden_states_of_the_model(name, check):
    """The scores are those of hidden states that transformers itself collects, put through the output embeddings."""
    inputs, layers, top = prompts(name, 2), [0, 2], 0.05
    out, record = generate(name, [DoLa(layers, relative_top=top)], inputs)
    model, tokens = families.model(name), answer(out)
    seen = said(name, inputs, tokens, output_hidden_states=True)
    close(out.logits, seen.logits)
    for step in (0, 1, 4):
        hidden = seen.hidden_states[step]
        with torch.no_grad():
            early = torch.stack([model.get_output_embeddings()(hidden[k][:, -1]) for k in layers]).log_softmax(-1)
        final = seen.logits[step].log_softmax(-1)
        p, q = final.exp(), early.exp()
        middle = ((p + q) / 2).log()
        far = 0.5 * (p * (final - middle) + q * (early - middle)).sum(-1)
        chosen = far.argmax(0)
        assert [row[step] for row in record["dola"]] == [layers[i] for i in chosen]
        expected = final - early[chosen, torch.arange(len(final))]
        expected = expected.masked_fill(final < final.amax(-1, keepdim=True) + math.log(top), -torch.inf)
        torch.testing.assert_close(out.scores[step], expected, **CLOSE)


@every("opera neutral")
def test_opera_without_penalty_is_plain_decoding(name, check):
    """Candidates that nobody judges change nothing, neither when the best is always picked nor when beams pick
    others.
    """
    opera = OPERA(penalty=0, threshold=None, num_candidates=6)
    if refused(name, check, [opera]):
        return
    inputs = prompts(name, 3)
    for options in ({}, dict(num_beams=3)):
        if options and families.mixed_up(inputs):
            continue
        (out, _), (plain, _) = generate(name, [opera], inputs, **options), generate(name, [], inputs, **options)
        assert torch.equal(out.sequences, plain.sequences)
        k = options.get("num_beams", 1)
        for mine, theirs in zip(out.logits, plain.logits, strict=True):
            for ours, expected in zip(mine.split(k), theirs.split(k), strict=True):
                # beams of an image whose scores are as good as equal may stand in either order
                orders = (expected[list(order)] for order in itertools.permutations(range(k)))
                assert any(torch.allclose(ours, one, **CLOSE) for one in orders)


@every("opera")
def test_operas_candidates_are_runs_of_their_own(name, check):
    """The scores are what each candidate's attention says when transformers runs it alone, early in the answer and
    after the tenth token; scales are tried until penalties count.
    """
    c, penalty, new = 3, 0.7, 12
    if refused(name, check, [OPERA(threshold=None)]):
        return
    inputs, many = prompts(name, 1), batch(name, [families.prompt(1, 4, SIZES[0])] * c)
    visual, model, last = families.visual(name, inputs)[0], families.model(name), families.full(name)[-1]
    before, costs = model.config._attn_implementation, {0: [], 3: [], 11: []}
    for scale in (50.0, 100.0, 200.0):
        out, _ = generate(
            name, [OPERA(num_candidates=c, scale=scale, penalty=penalty, threshold=None)], inputs, max_new_tokens=new
        )
        tokens = answer(out, new)[0]
        model.set_attn_implementation("eager")
        try:
            for step, seen in costs.items():
                best = out.logits[step][0].topk(c)[1]
                path = torch.cat(
                    [tokens[:step].expand(c, -1), best[:, None], best[:, None]], 1
                )  # the last one is said, and not run
                attention = said(name, many, path, output_attentions=True).attentions
                rows = [
                    attention[i + 1][last][:, :, -1].amax(1) for i in range(step + 1)
                ]  # of the answer's tokens, [c, t]
                rows = [row / row.sum(-1, keepdim=True) for row in rows]
                columns = [
                    sum((scale * rows[q][:, len(visual) + j]).log() for q in range(j, step + 1)) + math.log(1e-7)
                    for j in range(step + 1)
                ]
                trust = torch.stack(columns).amax(0).exp().clamp(max=100)
                cost = trust if step >= 10 else -rows[-1][:, : len(visual)][:, visual].sum(-1)
                torch.testing.assert_close(
                    out.scores[step][0][best], out.logits[step][0][best] - penalty * cost, **CLOSE
                )
                assert (out.scores[step] > -torch.inf).sum() == c
                seen += cost.abs().tolist()
        finally:
            model.set_attn_implementation(before)
        if all(any(0.01 < cost < 99 for cost in seen) for seen in costs.values()):
            return
    raise AssertionError("penalties must count for this test to mean anything")


@every("opera+prunehal")
def test_opera_and_prunehal_go_back_and_prune_under_beams(name, check):
    """Three beams, two images: every image goes back and prunes, and the batch equals one by one."""

    def decoders():
        return [stacks.Restless(num_candidates=6, scale=30.0, penalty=0.7), PruneHal(**PRUNEHAL)]

    options = dict(num_beams=3, max_new_tokens=13)
    if refused(name, check, decoders(), **options):
        return
    out, record = generate(name, decoders(), prompts(name, 2), **options)
    assert all(row["rollbacks"] for row in record["restless"]) and all(row["prunes"] for row in record["prunehal"])
    for i in range(2):
        alone, own = generate(name, decoders(), prompts(name, 1, i), **options)
        assert torch.equal(answer(alone, 13)[0], answer(out, 13)[i])
        assert float(alone.sequences_scores[0]) == pytest.approx(float(out.sequences_scores[i]), abs=2e-3)
        assert own["restless"][0] == record["restless"][i]
        assert [p["step"] for p in own["prunehal"][0]["prunes"]] == [p["step"] for p in record["prunehal"][i]["prunes"]]


def batch_equals_one_by_one(name: str, decoders, together: dict, apart: list[dict], **options) -> dict:
    """The record of the batch, whose rows say what each prompt says alone."""
    seeds = [3, 4, 5][: len(apart)]
    out, record = generate(name, decoders(), together, seeds=seeds, **options)
    for i, one in enumerate(apart):
        alone, own = generate(name, decoders(), one, seeds=seeds[i : i + 1], **options)
        assert torch.equal(answer(alone)[0], answer(out)[i])
        if "num_beams" not in options:
            close([x[0] for x in alone.logits], [x[i] for x in out.logits])
        if "prunehal" in record:
            assert [p["step"] for p in own["prunehal"][0]["prunes"]] == [
                p["step"] for p in record["prunehal"][i]["prunes"]
            ]
    return record


@every("batch = one by one")
def test_a_batch_of_unequal_prompts_equals_one_by_one(name, check):
    """PruneHal, and VCD with DoLa, on three prompts of different lengths and pictures."""
    together, apart = prompts(name, 3), [prompts(name, 1, i) for i in range(3)]
    assert (together["attention_mask"] == 0).any()
    record = batch_equals_one_by_one(name, lambda: [PruneHal(**PRUNEHAL)], together, apart)
    assert all(row["prunes"] for row in record["prunehal"])

    def both():
        return [VCD(alpha=0.6, beta=0.02), DoLa([0, 2], relative_top=0.02)]

    batch_equals_one_by_one(name, both, prompts(name, 2), apart[:2])


UNTOLD = (
    "llava_next",
    "llava_next_mistral",
    "llava_onevision",
    "lfm2_vl",
)  # whose pictures have more or fewer tokens than their pixels tell, so that VCD cannot seed each prompt's noise
TWO = families.prompt(4, 4, (48, 32), (32, 48))


@every("two pictures")
def test_two_pictures_in_one_prompt(name, check):
    """Plain decoding is generate's, the prompt is the same under beams, and PruneHal prunes among the tokens of both
    pictures.
    """
    inputs = batch(name, [TWO])
    same_as_generate(name, inputs, GLM4V if name == "glm4v" else SEARCHES)
    if not families.mixed_up(inputs):
        (one, _), (beams, _) = generate(name, [], inputs), generate(name, [], inputs, num_beams=3)
        close([beams.logits[0][:1]], [one.logits[0]])
    visual = families.visual(name, inputs)[0]
    _, record = generate(name, [PruneHal(**{**PRUNEHAL, "r": 0.5})], inputs)
    prunes = record["prunehal"][0]["prunes"]
    places = visual.nonzero().flatten().tolist()
    middle = places[len(places) // 2 - 1]
    assert prunes and all(len(kept) == len(places) // 2 for kept in prunes[0]["kept"])
    gone = set(places) - set.intersection(*map(set, prunes[0]["kept"]))
    assert any(i <= middle for i in gone) and any(i > middle for i in gone)


@every("one and two pictures")
def test_prompts_with_one_and_two_pictures_in_a_batch_equal_one_by_one(name, check):
    """Prompts with different numbers of pictures share a batch: PruneHal's under beams, VCD's under greedy search."""
    one = families.prompt(2, 7, (24, 64))
    together, apart = batch(name, [TWO, one]), [batch(name, [TWO]), batch(name, [one])]
    same_as_generate(name, together, ["greedy"] if name == "glm4v" else ["greedy", "beam"])
    for options in ({}, dict(num_beams=3)) if name in UNTOLD else (dict(num_beams=3),):
        record = batch_equals_one_by_one(name, lambda: [PruneHal(**PRUNEHAL)], together, apart, **options)
        assert all(row["prunes"] for row in record["prunehal"])
    if name in UNTOLD:
        with pytest.raises(StackError, match="one at a time"):
            generate(name, [VCD()], together)
    else:
        batch_equals_one_by_one(name, lambda: [VCD(alpha=0.6, beta=0.02)], together, apart)


@every("video")
def test_a_video(name, check):
    """Plain decoding is generate's, and PruneHal prunes the video's tokens."""
    inputs = families.video(name)
    same_as_generate(name, inputs, GLM4V if name == "glm4v" else SEARCHES)
    places = families.visual(name, inputs)[0].nonzero().flatten().tolist()
    _, record = generate(name, [PruneHal(**PRUNEHAL)], inputs)
    prunes = record["prunehal"][0]["prunes"]
    assert prunes and all(set(kept) < set(places) for kept in prunes[0]["kept"])


REFUSALS = {"florence2": "encoder-decoder", "mllama": "cross-attention"}


@pytest.mark.parametrize("name, check", [pytest.param(name, "refused", id=name) for name in families.REFUSED])
def test_other_kinds_of_models_are_refused_by_name(name, check):
    """Encoder-decoder and cross-attention models hold no visual tokens in the cache that is pruned; plain decoding is
    refused as well, since the loop would lose their masks.
    """
    for decoders in ([], [PruneHal()], [DoLa([0])]):
        with pytest.raises(StackError, match=REFUSALS[name]):
            generate(name, decoders, prompts(name, 1))
