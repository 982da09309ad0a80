"""What decoders add to attention: hidden equals dropped, a factor is a factor, and nothing is nothing."""

import math
from dataclasses import dataclass

import pytest
import stacks
import tiny
import torch

from decoders import Decoder, Reads


def odd(cached):
    """Visual tokens at odd places of the sequence."""
    return cached.visual & (cached.origin % 2 == 1)


@dataclass
class Drop(Decoder):
    """Drops the odd visual tokens after the prefill."""

    def reads(self, model):
        return Reads(visual=True)

    def observe(self, step, state):
        if step.longest > 1:
            return None
        kept = ~(step.visual & (step.origin % 2 == 1))
        dropped.append(int((~kept).sum()))
        return kept


@dataclass
class Hide(Decoder):
    """Adds `bias` to the scores of odd visual tokens, in every layer or from the second on."""

    bias: float
    apart: bool = False

    def reads(self, model):
        return Reads(visual=True, attention=None)

    def start(self, run):
        self.layers = run.layers

    def attend(self, cached, state):
        added.append(self.bias)
        there = odd(cached).expand(self.layers if self.apart else -1, -1, -1)
        out = torch.zeros(there.shape).masked_fill(there, self.bias)
        if self.apart:
            out[0] = 0
        return out

    def observe(self, step, state):
        seen.append((step.number.clone(), step.attention.clone(), step.visual.clone(), step.origin.clone()))


dropped: list = []
added: list = []
seen: list = []


@pytest.fixture(autouse=True)
def clean():
    for one in (dropped, added, seen):
        one.clear()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("search", stacks.SEARCHES)
@pytest.mark.parametrize(
    "names", [(), ("vcd",), ("opera",), ("dola", "vcd", "opera")], ids=lambda n: "+".join(n) or "alone"
)
def test_hidden_equals_dropped(names, search, implementation):
    """Also beside branches, candidates, returns and beams, and with rows of unequal length."""
    model = tiny.model("llava")
    model.set_attn_implementation(implementation)
    try:
        inputs = tiny.inputs("llava", 3)
        hidden, _ = stacks.run("llava", names, inputs, search, extra=(Hide(-math.inf),), seeds=[1, 2, 3])
        gone, _ = stacks.run("llava", names, inputs, search, extra=(Drop(),), seeds=[1, 2, 3])
    finally:
        model.set_attn_implementation("sdpa")
    assert max(dropped) > 0 and len(added) > 5
    assert torch.equal(hidden.sequences, gone.sequences)
    for a, b in zip(hidden.logits, gone.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("search", stacks.SEARCHES)
def test_nothing_added_is_nothing(search):
    inputs = tiny.inputs("llava", 2)
    with_zero, _ = stacks.run("llava", ("vcd",), inputs, search, extra=(Hide(0.0),), seeds=[1, 2])
    without, _ = stacks.run("llava", ("vcd",), inputs, search, seeds=[1, 2])
    assert torch.equal(with_zero.sequences, without.sequences)
    for a, b in zip(with_zero.logits, without.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_log_of_a_factor_is_a_factor_on_the_weights():
    """In the first layer, whose queries are the same whatever was attended to before; per layer it acts where it is
    asked to.
    """
    inputs = tiny.inputs("llava", 2)
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(math.log(3.0)),))
    boosted = [s for s in seen if s[0].max() == 2]
    seen.clear()
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(0.0),))
    before = [s for s in seen if s[0].max() == 2]
    (_, a, visual, origin), (_, b, _, _) = before[0], boosted[0]
    t = visual.shape[-1]
    there = (visual & (origin % 2 == 1))[0]
    factor = torch.where(there, 3.0, 1.0)
    assert there.any()
    # mean over heads of a softmax: exact only head by head, so against the direction and bounds of the change
    raised, others = (
        b[0, :, :t][there] / a[0, :, :t][there],
        b[0, :, :t][~there & (a[0, :, :t] > 0)] / a[0, :, :t][~there & (a[0, :, :t] > 0)],
    )
    assert (raised > 1).all() and (raised <= 3 + 1e-5).all() and (others < 1).all() and factor.max() == 3
    assert (raised.min() / others.max()) > 2
    seen.clear()
    stacks.run("llava", (), inputs, "greedy", new=3, extra=(Hide(math.log(3.0), apart=True),))
    apart = next(s for s in seen if s[0].max() == 2)
    torch.testing.assert_close(apart[1][0], a[0])
    assert not torch.allclose(apart[1][1], a[1], atol=1e-4)
