"""Logits of early layers are those of a product of their own, and are made in the model's."""

import pytest
import stacks
import tiny
import torch
from tiny import families

from baselines import DeCo, DoLa
from decoders import Decoder, Requirements, Stack, hf
from decoders.early import EarlyLogits

GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
CLOSE = dict(atol=1e-5, rtol=1e-5)


class Compare(Decoder):
    """Compares, at every look, the early logits with those made here of the same hidden states."""

    def __init__(self, layers: tuple[int, ...], normed: bool):
        self.layers, self.normed, self.looks = layers, normed, 0

    def requirements(self, model):
        return Requirements(hidden=self.layers, early_logits=self.layers, early_norm=self.normed)

    def init_state(self, context):
        return [context.model, context.to_logits]

    def process_logits(self, step, state, scores):
        self._compare(step, *state)
        last = self.layers.index(max(self.layers))
        torch.testing.assert_close(step.early_logits[last], step.logits, **CLOSE)  # behind the norm already
        return scores

    def select_slots(self, step, state):
        self._compare(step, *state)

    def _compare(self, step, model, to_logits):
        last = hf.num_layers(model)
        for i, hidden, early in zip(self.layers, step.hidden, step.early_logits, strict=True):
            normed = hf.final_norm(model)(hidden) if self.normed and i < last else hidden
            torch.testing.assert_close(early, to_logits(normed).detach(), **CLOSE)
        self.looks += 1


class Hidden(Decoder):
    """Reads hidden states only."""

    def requirements(self, model):
        return Requirements(hidden=(0, 1, 3))


@pytest.fixture
def joined(monkeypatch):
    """By forward that was to make early logits, whether the model's own product made them."""
    found, split = [], EarlyLogits.split

    def noted(self, *args):
        out = split(self, *args)
        found.append(out[1] is not None)
        return out

    monkeypatch.setattr(EarlyLogits, "split", noted)
    return found


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("name", [name for name in families.NAMES if name not in families.REFUSED])
def test_equal_a_product_of_their_own_in_every_family(name, normed, joined):
    model = families.model(name)
    compare = Compare((2, 0, hf.num_layers(model), 1), normed)
    if name == "lfm2_vl" and normed:
        assert "has no final norm where transformers puts it" in Stack([compare]).refusals(model)["compare"]
        return
    batch = [families.prompt(i, 4 + i, (40, 32)) for i in (1, 2)]
    inputs = families.inputs(name, [text for text, _ in batch], [pictures for _, pictures in batch])
    Stack([compare]).generate(model, **inputs, max_new_tokens=5, **GREEDY)
    assert compare.looks == 5 + 4 and joined == [True] * 4


@pytest.mark.parametrize("search", stacks.SEARCHES)
@pytest.mark.parametrize("names", [("opera",), ("vcd",), ("prunehal", "vcd", "opera"), ("dola", "deco")], ids="-".join)
def test_equal_a_product_of_their_own_beside_others(names, search, joined):
    """Candidates and returns beside OPERA, branches beside VCD; other layers, with and without the norm."""
    two = (Compare((3, 1), True), Compare((0, 2, 3), False))
    stacks.run("llava", names, tiny.inputs("llava", 2), search, extra=two)
    assert all(compare.looks > 14 for compare in two) and joined and all(joined)


@pytest.mark.parametrize("traced", ["eager"], indirect=True)
@pytest.mark.parametrize("compile, search", [("off", "beam"), ("on", "greedy")])
def test_beside_a_decoder_that_asks_for_logits_inside_the_forward(joined, traced, compile, search):
    """And beside candidates and a branch."""
    compare, names = Compare((1, 3), True), ("memvr", "opera", "vcd")
    stacks.run("llava", names, tiny.inputs("llava", 2), search, extra=(compare,), compile=compile)
    assert compare.looks > 14 and joined and all(joined)


def _heads(decoders: list[Decoder], new: int = 6, **options) -> list[tuple[int, ...]]:
    """Shapes of what the output embeddings got."""
    model, shapes = tiny.model("llava"), []
    handle = hf.output_embeddings(model).register_forward_hook(lambda module, args, out: shapes.append(out.shape[:-1]))
    try:
        Stack(decoders).generate(model, **tiny.inputs("llava", 2), max_new_tokens=new, **GREEDY | options)
    finally:
        handle.remove()
    return [tuple(shape) for shape in shapes]


def test_a_step_reads_the_output_embeddings_once():
    """Two prompts; without the norm layers 0 and 1, with it 1 and 2: after the prompt each step is one product."""
    both = [DoLa([0, 1]), DeCo(layers=[1, 2])]
    assert _heads(both) == [(2, 1), (2, 2), (2, 2), *[(1, 2 + 2 * 4)] * 5]
    assert _heads(both[:1], num_beams=3) == [(2, 1), (2, 6), *[(1, 6 + 6 * 2)] * 5]
    branch = [stacks.make("vcd"), DoLa([0, 1])]
    assert _heads(branch)[-5:] == [(1, 4 + 2 * 2)] * 5  # the branch's rows have no early logits


@pytest.mark.parametrize("traced", ["eager"], indirect=True)
def test_compiled_steps_make_them_too_and_tell_their_graphs_apart(joined, traced):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    normed, bare, beams = Compare((0, 1, 3), True), Compare((0, 1, 3), False), dict(num_beams=3)
    for decoder, options in ((Hidden(), {}), (normed, {}), (bare, {}), (Hidden(), {}), (normed, {}), (normed, beams)):
        del joined[:]
        stack = Stack([decoder], compile="on")
        stack.generate(model, **inputs, max_new_tokens=6, **GREEDY | options)
        assert stack.compiled is not None
        assert joined == ([] if isinstance(decoder, Hidden) else [True] * 5)


def test_they_are_read_where_hidden_states_are_returned(joined):
    compare = Compare((1, 3), True)
    asked = dict(return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
    options = dict(max_new_tokens=5, **asked, **GREEDY)
    out = Stack([compare]).generate(tiny.model("llava"), **tiny.inputs("llava", 2), **options)
    plain = tiny.model("llava").generate(**tiny.inputs("llava", 2), **options)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=2e-3, rtol=1e-4)
    for mine, theirs in zip(out.hidden_states[1:], plain.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[-1], theirs[-1], atol=2e-3, rtol=1e-4)
    assert compare.looks == 9 and joined == [True] * 4


def test_a_model_that_gives_its_head_another_shape_makes_them_apart(joined, monkeypatch):
    model, compare = tiny.model("llava"), Compare((1, 3), False)
    monkeypatch.setattr(EarlyLogits, "join", lambda self, newest, hidden: newest)
    Stack([compare]).generate(model, **tiny.inputs("llava", 2), max_new_tokens=5, **GREEDY)
    assert compare.looks == 9 and joined == [False] * 4
