"""What is asked of decoders that steer the model: how each is run, and what must not change its answers."""

from __future__ import annotations

import pytest
import stacks
import tiny
import torch

from decoders import Decoder, Stack, compiled
from prunehal import PruneHal

OPTIONS = dict(
    max_new_tokens=14,
    do_sample=False,
    eos_token_id=stacks.EOS,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
)
BESIDE = {
    "alone": list,
    "prunehal": lambda: [PruneHal(r=0.5, t=3)],
    "opera": lambda: [stacks.MAKE["opera"]()],  # which goes back
}


def generate(family: str, decoders: list[Decoder], inputs: dict, compile: str = "off", **options):
    return Stack(decoders, compile=compile).generate(tiny.model(family), **inputs, **OPTIONS | options)


def assert_it_acts(family: str, decoder: Decoder, beside: str = "alone", **options) -> None:
    """The decoder changes the scores of the first token."""
    inputs = tiny.inputs(family, 2)
    plain, out = (generate(family, [*own, *BESIDE[beside]()], inputs, **options) for own in ([], [decoder]))
    assert not torch.allclose(plain.scores[0], out.scores[0], atol=1e-2)


def assert_batch_is_singles(family: str, decoder: Decoder, beside: str = "alone", **options) -> None:
    """Three images with prompts of different lengths say together what each says alone."""
    inputs = tiny.inputs(family, 3)
    together = generate(family, [decoder, *BESIDE[beside]()], inputs, **options).sequences
    start = inputs["input_ids"].shape[1]
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in inputs.items() if len(v) == 3}
        if family.startswith("qwen"):  # patches of all pictures stand in one row
            one["pixel_values"] = inputs["pixel_values"].chunk(3)[i]
        there = one["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in one:
                one[name] = one[name][:, there]
        alone = generate(family, [decoder, *BESIDE[beside]()], one, **options).sequences
        answer = together[i, start : start + alone.shape[1] - int(there.sum())]
        assert answer.tolist() == alone[0, int(there.sum()) :].tolist()


def assert_compiled_is_eager(family: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, **options) -> None:
    """Steps run as graphs, as torch.compile traces them, say the same."""
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    inputs = tiny.inputs(family, 2)
    eager, graph = (generate(family, [decoder], inputs, compile=mode, **options) for mode in ("off", "on"))
    torch._dynamo.reset()
    assert torch.equal(eager.sequences, graph.sequences)
    torch.testing.assert_close(torch.stack(eager.scores), torch.stack(graph.scores), atol=2e-3, rtol=1e-4)
