"""Property 1: the empty stack is transformers' own generate."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from transformers import DynamicCache, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from decoders import Decoder, Requirements, Stack, StackError, hf

NEW = 20


def _eos(model, inputs):
    """Token ids that plain decoding really emits early, so that EOS ends some rows and not others."""
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
    return [int(ids[0, -NEW + 6]), int(ids[-1, -NEW + 11])]


@pytest.mark.parametrize("family, batch", [*((family, 4) for family in tiny.FAMILIES), ("llava", 1), ("qwen25vl", 1)])
def test_equals_generate_token_for_token(family, batch):
    model, inputs = tiny.model(family), tiny.inputs(family, batch)
    eos = _eos(model, inputs)
    for options in (
        dict(do_sample=False),
        dict(do_sample=False, eos_token_id=eos),
        dict(do_sample=True, temperature=1.7),
        dict(do_sample=True, top_p=0.9, top_k=30, eos_token_id=eos),
        dict(do_sample=True, num_return_sequences=2),
        dict(do_sample=False, repetition_penalty=1.3, min_new_tokens=9, eos_token_id=eos),
    ):
        options = dict(max_new_tokens=NEW, **options)
        torch.manual_seed(3)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(3)
        got = Stack([]).generate(model, **inputs, **options)
        assert torch.equal(got, expected), options
    torch.manual_seed(3)  # the last options alone: it is `Stack.generate` that transformers calls
    assert torch.equal(model.generate(**inputs, **options, custom_generate=Stack([])), expected)
    assert len(set(expected[0].tolist())) > 8, "the model's output must vary for this test to mean anything"


@pytest.mark.parametrize("family, batch", [*((family, 3) for family in tiny.FAMILIES), ("llava", 1), ("qwen25vl", 1)])
def test_beams_equal_generate_token_for_token(family, batch):
    model, inputs = tiny.model(family), tiny.inputs(family, batch)
    eos = _eos(model, inputs)
    for options in (
        dict(num_beams=4),
        dict(num_beams=3, eos_token_id=eos[:1], length_penalty=0.4),
        dict(num_beams=3, eos_token_id=eos, early_stopping=True),
        dict(num_beams=4, eos_token_id=eos, early_stopping="never", length_penalty=2.0, num_return_sequences=3),
        dict(num_beams=2, eos_token_id=eos, length_penalty=-1.0, repetition_penalty=1.3, min_new_tokens=9),
        dict(num_beams=3, eos_token_id=eos, do_sample=True, temperature=1.5, num_return_sequences=2),
        dict(num_beams=3, do_sample=True, top_p=0.9, top_k=30),
    ):
        options = dict(
            max_new_tokens=NEW,
            do_sample=options.pop("do_sample", False),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **options,
        )
        torch.manual_seed(3)
        expected = model.generate(**inputs, **options)
        for generate in (
            lambda **k: Stack([]).generate(model, **k),
            *([lambda **k: model.generate(**k, custom_generate=Stack([]))] if options.get("top_k") else []),
        ):
            torch.manual_seed(3)
            got = generate(**inputs, **options)
            assert torch.equal(got.sequences, expected.sequences), options
            assert torch.equal(got.beam_indices, expected.beam_indices), options
            torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=2e-3, rtol=1e-4)
    assert len(set(expected.sequences[0].tolist())) > 8, "the model's output must vary for this test to mean anything"


@pytest.mark.parametrize("family", ["llava", "qwen25vl"])
def test_dict_output_equals_generate(family):
    model, inputs = tiny.model(family), tiny.inputs(family, 2)
    options = dict(
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    expected, got = model.generate(**inputs, **options), Stack([]).generate(model, **inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(getattr(got, name)), torch.stack(getattr(expected, name)), atol=1e-4, rtol=1e-4
        )
    assert len(got.hidden_states) == len(expected.hidden_states) == 8
    assert hf.cache_of(got).get_seq_length() == hf.cache_of(expected).get_seq_length()


class _Collect(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.ended = True


def test_streamer_sees_what_transformers_streams():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    ours, theirs = _Collect(), _Collect()
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=theirs)
    Stack([]).generate(model, **inputs, max_new_tokens=6, do_sample=False, streamer=ours)
    assert ours.ended and len(ours.got) == len(theirs.got) == 7
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(ours.got, theirs.got, strict=False))


def test_stopping_criteria_and_processors_act():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    prompt = inputs["input_ids"].shape[1]
    stop = StoppingCriteriaList([lambda ids, scores, **kw: torch.full((len(ids),), ids.shape[1] >= prompt + 4)])
    ids = Stack([]).generate(model, **inputs, max_new_tokens=20, do_sample=False, stopping_criteria=stop)
    assert ids.shape[1] == prompt + 4
    assert (
        Stack([])
        .generate(
            model,
            **inputs,
            max_new_tokens=20,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]),
        )
        .shape[1]
        == prompt + 1
    )


class _Favour(Decoder):
    """A decoder defined outside the packages: its token always wins."""

    def process_logits(self, step, state, scores):
        scores = scores.clone()
        scores[:, 33] = 1e4
        return scores


class _Fail(Decoder):
    def requirements(self, model):
        return Requirements(attention=None, visual=True)

    def select_slots(self, step, state):
        if step.max_num_forwards == 3:
            raise KeyboardInterrupt


def test_foreign_decoder_joins_a_stack():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    ids = Stack([_Favour()]).generate(model, **inputs, max_new_tokens=5, do_sample=False)
    assert (ids[:, -5:] == 33).all()


@dataclass
class _Last(Decoder):
    """Requirements one layer, and notes the shape of what it is given."""

    layers: tuple[int, ...] | None = (-1,)

    def requirements(self, model):
        return Requirements(attention=self.layers)

    def init_state(self, context):
        return []

    def select_slots(self, step, state):
        state.append(step.attention)

    def record(self, state):
        return state


def test_each_decoder_sees_the_layers_that_it_reads():
    stack = Stack([_Last(), _Last(None)])
    stack.generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=4, do_sample=False)
    one, all_layers = stack.record["_last"], stack.record["_last_2"]
    assert all(torch.equal(a[0], b[2]) and len(a) == 1 and len(b) == 3 for a, b in zip(one, all_layers, strict=False))
    with pytest.raises(StackError, match="the model has 3"):
        Stack([_Last((7,))]).generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=2)


def test_model_is_left_as_it_was_after_an_interrupt():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    before = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    implementation = hf.attention_name(model)
    with pytest.raises(KeyboardInterrupt):
        Stack([_Fail()]).generate(model, **inputs, max_new_tokens=8, do_sample=False)
    assert hf.attention_name(model) == implementation
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), before)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(use_cache=False), "use_cache"),
        (dict(prefill_chunk_size=4), "prefill_chunk_size"),
        (dict(stop_strings=["x"]), "tokenizer"),
        (dict(cache_implementation="static"), "cache_implementation='static'"),
        (dict(cache_implementation="offloaded"), "offloaded"),
        (dict(past_key_values=DynamicCache()), "own"),
        (dict(penalty_alpha=0.6, top_k=4), "contrastive_search"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, words):
    with pytest.raises(StackError, match=words):
        Stack([_Favour()]).generate(
            tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=4, do_sample=False, **options
        )


def test_what_is_no_model_or_no_input_is_told_so():
    model, inputs = tiny.model("llava"), tiny.inputs("llava")
    for wrong in (inputs["input_ids"], type(model)):
        with pytest.raises(StackError, match="the first argument is a model"):
            Stack([]).generate(wrong)
    with pytest.raises(StackError, match="by name: stack.generate.model, ..inputs"):
        Stack([]).generate(model, inputs)


def test_only_decoders_make_a_stack():
    with pytest.raises(StackError, match="no decoder"):
        Stack([3])
    with pytest.raises(StackError, match="list of decoders"):
        Stack(_Favour())


def test_decoders_package_names_no_method():
    from pathlib import Path

    import decoders

    words = ("prune" + "hal", "opera", "vcd", "dola", "deco(")
    for file in Path(decoders.__file__).parent.glob("*.py"):
        text = file.read_text().lower()
        assert not [w for w in words if w in text], file
