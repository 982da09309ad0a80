"""DoLa: traces of the fork and of transformers' former core, and properties."""

import copy

import pytest
import tiny
import torch
from references import traces as golden
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from baselines import DoLa
from decoders import Decoder, Stack, StackError

CASES = [(file, name) for file in ("dola_fork", "dola_hf") for name in golden.trace(file)["cases"]]


def _decoder(settings, file):
    if file == "dola_hf":
        return DoLa(layers=settings["dola_layers"], faithful=True)
    layers = settings["candidate_premature_layers"] if settings["mode"] == "dynamic" else settings["base_layer"]
    return DoLa(layers=layers, relative_top=settings["relative_top"], faithful=True)


@pytest.mark.parametrize("file, name", CASES, ids=[f"{f}-{n}" for f, n in CASES])
def test_faithful_equals_the_official_trace(file, name, figures):
    case = golden.trace(file)["cases"][name]
    s = case["settings"]
    model = golden.model(s["model"])
    fork = file == "dola_fork"
    inputs = (
        {"inputs_embeds": golden.embeds(s["model"], 0)}
        if s["input"].startswith("embeds")
        else {"input_ids": golden.ids(s["model"], 1)}
    )
    inputs["repetition_penalty"] = s["repetition_penalty"]
    if fork and "inputs_embeds" in inputs:  # the fork begins with a dummy token, which its repetition penalty sees
        penalty = RepetitionPenaltyLogitsProcessor(inputs.pop("repetition_penalty"))
        inputs["logits_processor"] = [
            lambda ids, scores: penalty(
                torch.cat([torch.ones_like(ids[:, :1]) if ids.shape[1] else torch.tensor([[1]]), ids], 1), scores
            )
        ]
    stack = Stack([_decoder(s, file)])
    out = stack.generate(
        model,
        **inputs,
        max_new_tokens=s["max_new_tokens"],
        do_sample=False,
        eos_token_id=s["eos_token_id"],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences[0, -len(out.scores) :].tolist() == case["tokens"]
    assert stack.record["dola"][0] == case["premature_layers"]
    kept = [int((scores > -1e30).sum()) for scores in out.scores]
    assert kept == case["kept_per_step"]
    worst = 0.0
    for scores, step in zip(out.scores, case["steps"], strict=False):
        top = step["top10"]
        torch.testing.assert_close(scores[0, top["ids"]], torch.tensor(top["values"]), atol=1e-4, rtol=1e-4)
        worst = max(worst, float((scores[0, top["ids"]] - torch.tensor(top["values"])).abs().max()))
    figures(
        file,
        name,
        f"{len(kept)} tokens, layers, kept counts, {len(case['steps'])} steps' scores",
        f"scores {worst:.1e}",
    )


@pytest.mark.parametrize(
    "name", [n for n, c in golden.trace("dola_fork")["cases"].items() if c["settings"]["mode"] == "dynamic"]
)
def test_divergences_equal_the_official_trace(name, monkeypatch):
    case = golden.trace("dola_fork")["cases"][name]
    seen, plain = [], DoLa.divergences

    def noted(self, logits, early):
        seen.append(plain(self, logits, early))
        return seen[-1]

    monkeypatch.setattr(DoLa, "divergences", noted)
    test_faithful_equals_the_official_trace("dola_fork", name, lambda *row: None)
    for mine, step in zip(seen, case["steps"], strict=False):
        torch.testing.assert_close(mine[:, 0], torch.tensor(step["js_divs"]), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "count, low, high",
    [
        (32, range(0, 16, 2), range(16, 32, 2)),
        (40, range(0, 20, 2), range(20, 40, 2)),
        (60, range(0, 20, 2), range(40, 60, 2)),
        (80, range(0, 20, 2), range(60, 80, 2)),
    ],
)
def test_layers_of_the_published_models(count, low, high):
    assert DoLa("low").candidates(count) == list(low) and DoLa("high").candidates(count) == list(high)
    assert DoLa("low").candidates(count, tied=True) == list(low)[1:]
    assert DoLa([3, count]).candidates(count) == [3] and DoLa(5).candidates(count) == [5]


@pytest.mark.parametrize("family", ["llava", "qwen25vl", "instructblip"])
def test_batch_equals_one_by_one_and_rows_choose_for_themselves(family):
    batch = tiny.inputs(family, 4)
    options = dict(
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    decoder = DoLa([0, 1, 2], relative_top=0.3)
    stack = Stack([decoder])
    out = stack.generate(tiny.model(family), **batch, **options)
    layers = stack.record["dola"]
    assert all(layers) and not any(map(torch.equal, out.scores, out.logits))
    assert family != "llava" or len({tuple(row) for row in layers}) > 1
    for i in range(4):
        alone = Stack([decoder])
        single = alone.generate(tiny.model(family), **tiny.one(batch, i), **options)
        assert single.sequences[0, -16:].tolist() == out.sequences[i, -16:].tolist()
        assert alone.record["dola"][0] == layers[i]
        torch.testing.assert_close(
            torch.stack(out.logits)[:, i], torch.stack(single.logits)[:, 0], atol=5e-3, rtol=1e-3
        )


def test_faithful_has_one_layer_for_the_batch():
    """The layer of the largest mean over the rows, in place of each row's own."""
    rows = {}
    for faithful in (True, False):
        stack = Stack([DoLa([0, 1, 2, 3], faithful=faithful)])
        stack.generate(
            golden.model("A"),
            input_ids=torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(0)),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows[faithful] = stack.record["dola"]
    assert len({tuple(row) for row in rows[False]}) == 3
    assert len({tuple(row) for row in rows[True]}) == 1 and len(set(rows[True][0])) > 1
    own, early = torch.randn(2, 9), torch.randn(3, 2, 9) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    p, q = own.softmax(-1), early.softmax(-1)
    m = (p + q) / 2
    expected = 0.5 * ((m * (m / p).log()).mean(-1) + (m * (m / q).log()).mean(-1))
    torch.testing.assert_close(DoLa(faithful=True).divergences(own.log_softmax(-1), early.log_softmax(-1)), expected)


def test_scores_of_decoders_before_are_contrasted_and_the_layer_is_the_models_own():
    class Before(Decoder):
        def process_logits(self, step, state, scores):
            return (scores.roll(1, -1)).masked_fill(torch.arange(scores.shape[-1]) % 3 == 0, -torch.inf)

    model, inputs = golden.model("A"), {"input_ids": golden.ids("A", 1)}
    options = dict(
        max_new_tokens=1,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    alone, after = Stack([DoLa([0, 2], relative_top=0)]), Stack([Before(), DoLa([0, 2], relative_top=0)])
    one, two = (stack.generate(model, **inputs, **options) for stack in (alone, after))
    assert alone.record["dola"] == after.record["dola"]
    assert all(alone.record["dola"]) and not torch.equal(one.scores[0], one.logits[0])
    early = one.logits[0] - one.scores[0]
    torch.testing.assert_close(
        two.scores[0], Before().process_logits(None, None, two.logits[0]) - early, atol=1e-4, rtol=1e-4
    )
    with_top = Stack([Before(), DoLa([0, 2])]).generate(model, **inputs, **options).scores[0]
    assert not with_top.isnan().any() and torch.isneginf(with_top[:, ::3]).all()


def test_layers_of_a_shallow_model_with_one_embedding():
    assert [DoLa("low").candidates(count, tied=True) for count in (1, 2, 3, 4, 8)] == [[0], [1], [2], [2], [2]]
    model = tiny.model("internvl")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    stack = Stack([DoLa("low")])
    stack.generate(model, **tiny.inputs("internvl"), max_new_tokens=2, do_sample=False)
    assert set(stack.record["dola"][0]) == {2}


def test_true_divergence_is_jensen_shannon():
    torch.manual_seed(1)
    logits, early = torch.randn(2, 9), torch.randn(3, 2, 9)
    got = DoLa().divergences(logits.log_softmax(-1), early.log_softmax(-1))
    for k in range(3):
        for n in range(2):
            p, q = logits[n].softmax(-1), early[k, n].softmax(-1)
            m = (p + q) / 2
            expected = 0.5 * sum(
                float(x * (x / y).log()) for x, y in [*zip(p, m, strict=False), *zip(q, m, strict=False)]
            )
            assert float(got[k, n]) == pytest.approx(expected, rel=1e-4)
    assert (got < torch.log(torch.tensor(2.0))).all()


def test_mature_layer_takes_the_place_of_the_last():
    model, inputs = golden.model("A"), {"input_ids": golden.ids("A", 1)}
    out = Stack([DoLa([1], mature=3)]).generate(
        model,
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    head = model.get_output_embeddings()
    final, base = (head(hidden[i][0, -1]).log_softmax(-1) for i in (3, 1))
    kept = final >= final.max() + torch.log(torch.tensor(0.1))
    torch.testing.assert_close(out.scores[0][0][kept], (final - base)[kept], atol=1e-5, rtol=1e-5)
    assert torch.isneginf(out.scores[0][0][~kept]).all()


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(layers="lo"), "Did you mean 'low'"),
        (dict(layers=-1), ">= 0"),
        (dict(layers=[]), "list"),
        (dict(relative_top=1.2), "in \\[0, 1\\]"),
        (dict(faithful=None), "true or false"),
        (dict(mature=True), "index"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        DoLa(**bad)


def test_layers_beyond_the_model_are_refused():
    for layers in (9, [3]):
        with pytest.raises(StackError, match="hidden states 0 to 3|layers below 3"):
            Stack([DoLa(layers)]).generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=2)


@pytest.mark.parametrize("family, cap", [("cohere2", None), ("gemma3", 5.0), ("gemma3", 20.0)])
def test_early_logits_are_scaled_or_capped_as_the_model_does_its_own(family, cap):
    """Cohere scales what its output embeddings make, Gemma may cap it: layers are contrasted on one scale. Far below
    the cap, the model's own logits do not show it.
    """
    torch.manual_seed(5)
    if family == "cohere2":
        model = Cohere2ForCausalLM(Cohere2Config(**tiny.TEXT, logit_scale=0.125))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**tiny.TEXT, head_dim=12, query_pre_attn_scalar=12, final_logit_softcapping=cap)
        )
    model = tiny.lively(model.eval())
    if cap == 20:  # an early layer whose logits are much larger than the model's own
        model.get_input_embeddings().weight.data.mul_(20)
        model.lm_head = copy.deepcopy(model.lm_head)
        model.lm_head.weight.data.div_(20)
    ids = torch.randint(20, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    options = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    out = Stack([DoLa([1], relative_top=0)]).generate(model, **options)
    with torch.no_grad():
        early = model.get_output_embeddings()(model(ids, output_hidden_states=True).hidden_states[1][:, -1])
    early = early * 0.125 if family == "cohere2" else cap * (early / cap).tanh()
    torch.testing.assert_close(out.scores[0], out.logits[0] - early, atol=1e-3, rtol=1e-4)


def test_a_head_that_is_not_known_is_refused():
    model = tiny.lively(LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).eval())
    forward = model.forward

    def cubed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits**3
        return out

    model.forward = cubed
    with pytest.raises(StackError, match="in a way that is not known"):
        Stack([DoLa([1])]).generate(model, input_ids=torch.tensor([[30, 31, 32]]), max_new_tokens=2)
