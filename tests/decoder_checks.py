"""What every decoder must keep, checked on tiny models: neutral settings, batches, others beside it, compiled steps."""

import stacks
import tiny
import torch

from baselines import VCD
from decoders import Stack, compiled
from prunehal import PruneHal

NEW = 12
BESIDE = {
    "alone": lambda: [],
    "prunehal": lambda: [PruneHal(r=0.5, t=3)],
    "opera": lambda: [stacks.Restless(num_candidates=4, scale=30.0, penalty=0.7)],
    "vcd": lambda: [VCD(alpha=0.6, beta=0.02)],
}


def run(family, decoders, inputs, search="greedy", new=NEW, **options):
    """(output with logits and scores, record)"""
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0) | stacks.SEARCHES[search] | options
    stack = Stack(decoders)
    out = stack.generate(
        tiny.model(family),
        **inputs,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    return out, stack.record


def assert_same(a, b):
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), atol=2e-3, rtol=1e-3)


def differs(a, b) -> bool:
    """Whether the scores of any step do."""
    return len(a.scores) != len(b.scores) or not all(map(torch.equal, a.scores, b.scores))


def assert_changes_nothing(make, family, search):
    inputs = tiny.inputs(family, 2)
    assert_same(run(family, [make()], inputs, search)[0], run(family, [], inputs, search)[0])


def assert_acts_the_same_in_a_batch(make, family, search, beside="alone", **options):
    """Prompts of unequal length say together what each says alone, and each is changed by the decoder."""
    inputs = tiny.inputs(family, 3, seed=2)
    both, told = run(family, [make(), *BESIDE[beside]()], inputs, search, seeds=[4, 5, 6], **options)
    without = run(family, BESIDE[beside](), inputs, search, seeds=[4, 5, 6], **options)[0]
    assert differs(both, without)
    k = len(both.logits[0]) // 3
    if beside == "prunehal":
        assert all(row["prunes"] for row in told["prunehal"])
    for i in range(3):
        one = run(family, [make(), *BESIDE[beside]()], tiny.one(inputs, i), search, seeds=[4 + i], **options)[0]
        assert one.sequences[0, -NEW:].tolist() == both.sequences[i, -NEW:].tolist()
        if search == "greedy" and beside != "opera":  # rows that go back at times of their own are not in step
            mine = torch.stack([scores[i * k : (i + 1) * k] for scores in both.scores])
            torch.testing.assert_close(torch.stack(one.scores), mine, atol=2e-3, rtol=1e-3)


def assert_compiles(make, family, search, monkeypatch, beside="alone"):
    """Steps run as the graphs that torch.compile traces say what eager ones say."""
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    inputs, decoders = tiny.inputs(family, 2, seed=4), lambda: [make(), *BESIDE[beside]()]
    eager = run(family, decoders(), inputs, search)[0]
    graph = run(family, decoders(), inputs, search, compile="on")[0]
    torch._dynamo.reset()
    assert_same(eager, graph)
