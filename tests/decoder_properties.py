"""What every decoder keeps: alone, in a batch, with a pruner, with one that goes back, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import stacks
import tiny
import torch
from acting import all_watched

from decoders import Decoder, Stack, compiled
from prunehal import PruneHal

NEW = 14
OPTIONS = dict(
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=stacks.EOS,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
)
SEARCHES = {"greedy": {}, "beam": dict(num_beams=3)}
CLOSE = dict(atol=3e-3, rtol=1e-3)

Make = Callable[[], Decoder]
# with these the pruner prunes and OPERA goes back on the tiny models
OTHERS: dict[str, tuple[Make, ...]] = {
    "alone": (),
    "prunehal": (lambda: PruneHal(r=0.5, t=3),),
    "opera": (stacks.MAKE["opera"],),
    "opera, prunehal": (stacks.MAKE["opera"], lambda: PruneHal(r=0.5, t=3)),
    "vcd": (stacks.MAKE["vcd"],),
}


def run(family: str, decoders: Sequence[Decoder], inputs: dict, search: str, seeds=None, **options):
    """(output, record) of a stack."""
    stack, options = Stack(decoders), OPTIONS | SEARCHES[search] | options
    return stack.generate(tiny.model(family), **inputs, seeds=seeds, **options), stack.record


def is_plain(family: str, decoder: Decoder, search: str) -> None:
    """The decoder asks for nothing and changes nothing."""
    inputs = tiny.inputs(family, 2)
    assert decoder.requirements(tiny.model(family)) == Decoder().requirements(None)
    (mine, _), (plain, _) = run(family, [decoder], inputs, search), run(family, [], inputs, search)
    assert torch.equal(mine.sequences, plain.sequences)
    assert all(map(torch.equal, mine.logits, plain.logits))


def batch_equals_singles(family: str, make: Make, others: str, search: str, **options) -> None:
    """Three unequal prompts say together what each says alone, and every decoder of the stack acts."""
    batch = tiny.inputs(family, 3)
    decoders, acted = all_watched([*(other() for other in OTHERS[others]), make()])
    out, record = run(family, decoders, batch, search, seeds=[3, 4, 5], **options)
    assert all(acted), f"{[set(a) for a in acted]} of {others} and {decoders[-1]}"
    without, _ = run(family, [other() for other in OTHERS[others]], batch, search, seeds=[3, 4, 5])
    assert len(out.scores) != len(without.scores) or not all(map(torch.equal, out.scores, without.scores))
    if "prunehal" in record:
        assert all(row["prunes"] for row in record["prunehal"])
    if "restless" in record:
        assert any(row["rollbacks"] for row in record["restless"])
    for i in range(3):
        decoders = [*(other() for other in OTHERS[others]), make()]
        alone, own = run(family, decoders, tiny.one(batch, i), search, seeds=[3 + i], **options)
        one = tiny.one(batch, i)
        said = alone.sequences[0, one["input_ids"].shape[1] :].tolist()
        expected = out.sequences[i, batch["input_ids"].shape[1] :].tolist()
        # beams are filled with the first EOS, as transformers does
        assert said == expected[: len(said)] and set(expected[len(said) :]) <= {0, stacks.EOS[0]}
        if search == "beam":
            torch.testing.assert_close(alone.sequences_scores[0], out.sequences_scores[i], **CLOSE)
        else:
            for mine, theirs in zip(alone.logits, out.logits, strict=False):
                torch.testing.assert_close(mine[0], theirs[i], **CLOSE)
        if "prunehal" in record:
            steps = [[p["step"] for p in one["prunes"]] for one in (own["prunehal"][0], record["prunehal"][i])]
            assert steps[0] == steps[1]


def compiled_equals_eager(family: str, make: Make, search: str, monkeypatch) -> None:
    """The graph that torch.compile would compile, run as it was traced, says what the eager step says."""
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    inputs = tiny.inputs(family, 2, seed=4)
    decoders = [lambda: PruneHal(r=0.5, t=3), make]
    eager, _ = run(family, [one() for one in decoders], inputs, search, eos_token_id=None)
    stack = Stack([one() for one in decoders], compile="on")
    graph = stack.generate(tiny.model(family), **inputs, **OPTIONS | SEARCHES[search] | dict(eos_token_id=None))
    torch._dynamo.reset()
    assert stack.compiled is not None and stack.compiled["graphs"]
    assert torch.equal(eager.sequences, graph.sequences)
    torch.testing.assert_close(torch.stack(eager.scores), torch.stack(graph.scores), **CLOSE)
