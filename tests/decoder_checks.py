"""What tests of one decoder check of it on tiny models, beyond what every stack must keep (tests/decoders)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import stacks
import tiny
import torch
from acting import all_watched

from decoders import Decoder, Requirements, Stack, compiled

NEW = 12
CLOSE = dict(atol=2e-3, rtol=1e-3)
Make = Callable[[], Decoder]


def run(family: str, decoders: Sequence[Decoder], inputs: dict, search: str = "greedy", new: int = NEW, **options):
    """(output with logits and scores, record) of a stack."""
    stack, defaults = Stack(decoders), dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    out = stack.generate(
        tiny.model(family),
        **inputs,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **defaults | stacks.SEARCHES[search] | options,
    )
    return out, stack.record


def assert_same(a, b) -> None:
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.scores), torch.stack(b.scores), **CLOSE)


def differs(a, b) -> bool:
    """Whether the scores of any step do."""
    return len(a.scores) != len(b.scores) or not all(map(torch.equal, a.scores, b.scores))


def assert_changes_nothing(decoder: Decoder, family: str, search: str) -> None:
    inputs = tiny.inputs(family, 2)
    assert_same(run(family, [decoder], inputs, search)[0], run(family, [], inputs, search)[0])


def assert_asks_for_nothing(decoder: Decoder, family: str) -> None:
    """And changes nothing."""
    assert replace(decoder.requirements(tiny.model(family)), constant_forward=False) == Requirements()
    for search in ("greedy", "beam"):
        assert_changes_nothing(decoder, family, search)


def assert_acts_the_same_in_a_batch(make: Make, family: str, search: str, beside: str | None = None) -> None:
    """Prompts of unequal length say together what each says alone, and the decoder changes what they say.

    Args:
        beside: a decoder of `stacks.METHODS` that stands beside it, and acts as well.
    """

    def others():
        return [] if beside is None else [stacks.make(beside, family)]

    inputs, seeds = tiny.inputs(family, 3, seed=2), [4, 5, 6]
    company, acted = all_watched(others())
    both, told = run(family, [make(), *company], inputs, search, seeds=seeds)
    assert all(acted), f"{beside} changes nothing"
    assert differs(both, run(family, others(), inputs, search, seeds=seeds)[0])
    for i in range(3):
        one, own = run(family, [make(), *others()], tiny.one(inputs, i), search, seeds=seeds[i : i + 1])
        assert torch.equal(one.sequences[0, -NEW:], both.sequences[i, -NEW:])
        if search == "beam":
            torch.testing.assert_close(one.sequences_scores[0], both.sequences_scores[i], **CLOSE)
        else:
            torch.testing.assert_close(torch.stack(one.logits)[:, 0], torch.stack(both.logits)[:, i], **CLOSE)
        if beside == "prunehal":
            steps = [[p["step"] for p in row["prunes"]] for row in (own["prunehal"][0], told["prunehal"][i])]
            assert steps[0] == steps[1] != []


def assert_compiles(make: Make, family: str, search: str, monkeypatch) -> None:
    """Beside PruneHal, steps run as the graphs that torch.compile traces say what eager ones say."""
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    inputs, decoders = tiny.inputs(family, 2, seed=4), lambda: [make(), stacks.make("prunehal")]
    eager = run(family, decoders(), inputs, search)[0]
    graph = run(family, decoders(), inputs, search, compile="on")[0]
    torch._dynamo.reset()
    assert_same(eager, graph)
