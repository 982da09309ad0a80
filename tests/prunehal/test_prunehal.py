"""PruneHal against an independent reference that masks, over every family and every option."""

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references.masked_prunehal import masked_prunehal

from decoders import Decoder, Requirements, Stack, StackError, hf
from prunehal import PruneHal

DEFAULTS = dict(
    r=0.5,
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
STEPS = 24


def _options(**changes):
    return {**DEFAULTS, **changes}


def _run(family, inputs, options, steps=STEPS, **more):
    stack = Stack([PruneHal(**options)])
    out = stack.generate(
        tiny.model(family),
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return out, stack.record["prunehal"]


def _reference(family, inputs, options, steps=STEPS, replay=None):
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()

    def generate(model, inputs, loop):
        model.generate(**inputs, max_new_tokens=steps, do_sample=False, eos_token_id=None, custom_generate=loop)

    return masked_prunehal(
        generate, tiny.model(family), inputs, visual, tiny.TEXT["num_hidden_layers"], steps, options, replay
    )


def _visual_only(record, inputs):
    """Kept visual tokens by step, {m: [per layer]}."""
    return {p["step"]: p["kept"] for p in record["prunes"]}


def _check(family, options, seed=0):
    inputs = tiny.inputs(family, 1, seed=seed)
    out, (record,) = _run(family, inputs, options)
    tokens, logits, prunes = _reference(family, inputs, options)
    assert [p["step"] for p in record["prunes"]] == [m for m, _ in prunes]
    for mine, (_, kept) in zip(record["prunes"], prunes, strict=False):
        assert mine["kept"] == [kept[layer] for layer in range(len(kept))]
    assert out.sequences[0, -STEPS:].tolist() == tokens
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, atol=2e-3, rtol=1e-4)
    # text stays: the cache has lost exactly what the prunes dropped
    visual = int((inputs["input_ids"] == tiny.IMAGE).sum())
    left = len(prunes[-1][1][0]) if prunes else visual
    assert hf.cache_of(out).layers[0].keys.shape[2] == inputs["input_ids"].shape[1] + STEPS - 1 - (visual - left)
    return prunes


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_equals_masked(family):
    prunes = _check(family, _options(r=0.7, t=4))
    assert prunes


def test_a_boost_of_1_drops_nothing_and_changes_nothing():
    inputs = tiny.inputs("llava", 2)
    out, records = _run("llava", inputs, _options(boost=1))
    plain = Stack([]).generate(
        tiny.model("llava"),
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert (
        torch.equal(out.sequences, plain.sequences)
        and hf.cache_of(out).layers[0].keys.shape == hf.cache_of(plain).layers[0].keys.shape
    )
    assert all(r["prunes"] for r in records)
    acting, _ = _run("llava", inputs, _options(boost=3.0))
    assert not torch.equal(torch.stack(acting.logits), torch.stack(out.logits))


def test_a_boost_raises_what_a_prune_would_keep():
    """The first set is the one that dropping keeps, later ones lie within it, and all the weight gained is where it was
    asked for.
    """
    inputs = tiny.inputs("llava", 2)
    _, dropped = _run("llava", inputs, _options(t=1))
    _, once = _run("llava", inputs, _options(boost=4.0, t=1))
    assert [r["prunes"][0]["kept"] for r in once] == [r["prunes"][0]["kept"] for r in dropped]
    _, none = _run("llava", inputs, _options(boost=1.0, t=1))
    for a, b in zip(
        once, none, strict=False
    ):  # from the second forward on the curve is of the tokens kept, boosted or not
        assert torch.equal(a["attention"][0], b["attention"][0]) and (a["attention"][1] > 1.3 * b["attention"][1]).all()
    _, more = _run("llava", inputs, _options(boost=2.0, forced_counts=False, r=0.7))
    assert any(len(r["prunes"]) > 1 for r in more)
    for r in more:
        for first, second in zip(r["prunes"], r["prunes"][1:], strict=False):
            assert all(set(s) < set(f) for f, s in zip(first["kept"], second["kept"], strict=False))


@pytest.mark.parametrize(
    "changes",
    [
        dict(reference="first_step"),
        dict(reference="reset_on_prune", r=0.8, t=4),
        dict(timing="after"),
        dict(sets="shared"),
        dict(majority="half", r=0.9),
        dict(forced=False, r=0.8),
        dict(forced_counts=False, t=1),
        dict(keep="lowest"),
        dict(top_k=5),
        dict(first_token=True),
        dict(first_token=True, timing="after", sets="shared"),
        dict(r=0.01),
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_option_equals_the_reference(changes):
    fired = [_check(family, _options(**changes), seed) for family in ("llava", "qwen25vl") for seed in (0, 1)]
    assert any(fired), "nothing was pruned, so nothing was tested"


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(tiny.FAMILIES)),
    seed=st.integers(0, 50),
    options=st.fixed_dictionaries(
        dict(
            r=st.sampled_from([0.2, 0.4, 0.7, 0.9, 0.97]),
            t=st.integers(0, 5),
            reference=st.sampled_from(["running_mean", "first_step", "reset_on_prune"]),
            timing=st.sampled_from(["before", "after"]),
            sets=st.sampled_from(["per_layer", "shared"]),
            majority=st.sampled_from(["strict", "half"]),
            forced=st.booleans(),
            forced_counts=st.booleans(),
            keep=st.sampled_from(["top", "lowest"]),
            first_token=st.booleans(),
        )
    ),
)
def test_any_combination_of_options_equals_the_reference(family, seed, options):
    prunes = _check(family, options | {"top_k": None}, seed)
    counted = len(prunes) - (not options["forced_counts"] and (options["forced"] or options["first_token"]))
    assert counted <= options["t"]
    if options["t"] and (options["forced"] or options["first_token"]) and options["r"] < 0.9:
        assert prunes


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_random_control_keeps_as_many_and_equals_masking_them(family):
    inputs = tiny.inputs(family, 1)
    options = _options(keep="random", r=0.6)
    out, (record,) = _run(family, inputs, options)
    replay = {m: dict(enumerate(kept)) for m, kept in _visual_only(record, inputs).items()}
    assert replay and all(len({len(k) for k in kept.values()}) == 1 for kept in replay.values())
    tokens, logits, _ = _reference(family, inputs, options, replay=replay)
    assert out.sequences[0, -STEPS:].tolist() == tokens
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], logits, atol=2e-3, rtol=1e-4)
    again, _ = _run(family, inputs, options)
    other, _ = _run(family, inputs, options | {"seed": 5})
    assert torch.equal(again.sequences, out.sequences)
    assert not torch.equal(torch.stack(other.logits), torch.stack(out.logits))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_r_1_changes_nothing(family):
    inputs = tiny.inputs(family, 2)
    out, records = _run(family, inputs, _options(r=1))
    plain = Stack([]).generate(
        tiny.model(family),
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=2e-3, rtol=1e-4)
    assert not any(r["prunes"] for r in records)
    acting, records = _run(family, inputs, _options(r=0.5))
    assert all(r["prunes"] for r in records) and not torch.equal(torch.stack(acting.logits), torch.stack(out.logits))


@pytest.mark.parametrize(
    "changes",
    [
        dict(r=0.7, t=4),
        dict(keep="random"),
        dict(first_token=True),
        dict(sets="shared", timing="after"),
        dict(boost=3.0, r=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_equals_one_by_one(family, changes):
    batch = tiny.inputs(family, 3)
    out, records = _run(family, batch, _options(**changes))
    pads = batch["attention_mask"].eq(0).sum(-1).tolist()
    assert len(set(pads)) > 1 and any(r["prunes"] for r in records)
    for i in range(3):
        alone, (record,) = _run(family, tiny.one(batch, i), _options(**changes))
        torch.testing.assert_close(torch.stack(out.logits)[:, i], torch.stack(alone.logits)[:, 0], atol=5e-3, rtol=1e-3)
        assert out.sequences[i, -STEPS:].tolist() == alone.sequences[0, -STEPS:].tolist()
        assert [p["step"] for p in records[i]["prunes"]] == [p["step"] for p in record["prunes"]]
        shifted = [[[v - pads[i] for v in k] for k in p["kept"]] for p in records[i]["prunes"]]
        assert shifted == [p["kept"] for p in record["prunes"]]


def test_eager_equals_sdpa():
    inputs = tiny.inputs("llava", 2)
    one, records = _run("llava", inputs, DEFAULTS)
    model = tiny.model("llava")
    model.set_attn_implementation("eager")
    try:
        two, others = _run("llava", inputs, DEFAULTS)
    finally:
        model.set_attn_implementation("sdpa")
    for mine, other in zip(records, others, strict=True):
        assert mine["prunes"] == other["prunes"] != []
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), atol=2e-3, rtol=1e-4)


def test_rows_that_have_finished_no_longer_prune():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 3)
    options = dict(max_new_tokens=STEPS, do_sample=False)
    plain = Stack([PruneHal(r=0.9, t=9)]).generate(model, **inputs, **options, eos_token_id=None)
    eos = int(plain[0, inputs["input_ids"].shape[1] + 1])
    stack = Stack([PruneHal(r=0.9, t=9)])
    ids = stack.generate(model, **inputs, **options, eos_token_id=[eos])
    assert (ids[0, -3:] == tiny.PAD).all() and len(set(ids[1].tolist())) > 3
    prunes = [[p["step"] for p in record["prunes"]] for record in stack.record["prunehal"]]
    assert prunes[0] and max(prunes[0]) <= 2 < max(prunes[1])


def test_sampling_runs_and_repeats():
    model, inputs = tiny.model("qwen25vl"), tiny.inputs("qwen25vl", 2)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        stack = Stack([PruneHal()])
        runs.append(stack.generate(model, **inputs, max_new_tokens=12, do_sample=True, temperature=1.5))
        assert all(record["prunes"] for record in stack.record["prunehal"])
    assert torch.equal(*runs)


def test_record_holds_the_attention_curve():
    inputs = tiny.inputs("llava", 2)
    _, records = _run("llava", inputs, DEFAULTS)
    for record in records:
        assert record["attention"].shape == (STEPS - 1, tiny.TEXT["num_hidden_layers"])
        assert (record["attention"] > 0).all()
        assert record["prunes"][0]["step"] == 2 and record["prunes"][0]["votes"] == [True] * 3


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(r=0), "in \\(0, 1\\], not 0; the default is 0.4"),
        (dict(r=1.5), "share of visual tokens kept, a number in \\(0, 1\\], not 1.5; the nearest valid value is 1"),
        (dict(r="x"), "in \\(0, 1\\]"),
        (dict(t=-1), "nearest valid value is 0"),
        (dict(t=1.5), "integer"),
        (dict(keep="topp"), "Did you mean 'top'"),
        (dict(reference="mean"), "running_mean"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=2.5), "top_k is an integer"),
        (dict(seed="a"), "seed is an integer"),
        (dict(first_token="yes"), "true or false"),
        (dict(top_k=4, forced=False), "forced"),
        (dict(boost=0), "boost is a factor, a number > 0 or none, not 0"),
        (dict(boost=2.0, first_token=True), "leave one out"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        PruneHal(**bad)


def test_a_prompt_without_visual_tokens_is_refused():
    model = tiny.model("llava")
    with pytest.raises(StackError, match="no prompt holds visual tokens"):
        Stack([PruneHal()]).generate(
            model,
            input_ids=torch.tensor([[1, 30, 31]]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            max_new_tokens=3,
        )
    with pytest.raises(StackError, match="no image-token id"):
        tiny.model("instructblip").generate(
            **tiny.inputs("instructblip"), max_new_tokens=3, custom_generate=Stack([PruneHal()])
        )


def test_visual_mask_overrides_detection():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    mask = inputs["input_ids"] == tiny.IMAGE
    options = dict(max_new_tokens=8, do_sample=False)
    expected = Stack([PruneHal()]).generate(model, **inputs, **options)
    assert not torch.equal(expected, Stack([]).generate(model, **inputs, **options))
    assert torch.equal(Stack([PruneHal()], visual_mask=mask).generate(model, **inputs, **options), expected)
    with pytest.raises(StackError, match="visual mask"):
        Stack([PruneHal()], visual_mask=mask[:, :4]).generate(model, **inputs, **options)


class _DropsInTheFirstLayer(Decoder):
    """Drops all but `count` visual tokens of the first layer, before the first token; the other layers keep theirs."""

    def __init__(self, count):
        self.count = count

    def requirements(self, model):
        return Requirements(visual=True, reruns_last_token=True)

    def select_slots_after_prefill(self, step, state):
        surplus = step.visual & (step.visual.cumsum(-1) > self.count)
        keeps = torch.ones(tiny.TEXT["num_hidden_layers"], *surplus.shape[1:], dtype=torch.bool)
        keeps[0] = ~surplus[0]
        return keeps


@pytest.mark.parametrize("count", [6, 1])
def test_prune_keeps_a_share_of_what_each_layer_holds(count):
    """Also where another decoder left the first layer so few visual tokens that nothing is to drop there."""
    inputs = tiny.inputs("llava")
    stack = Stack([_DropsInTheFirstLayer(count), PruneHal(**_options(t=3))])
    stack.generate(tiny.model("llava"), **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    held = [count, 16, 16]
    prunes = stack.record["prunehal"][0]["prunes"]
    assert prunes
    for prune in prunes:
        held = [max(1, n // 2) for n in held]
        assert [len(kept) for kept in prune["kept"]] == held
