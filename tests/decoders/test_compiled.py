"""Steps that are compiled say what eager ones say, and what cannot be compiled is named.

Most cases run the graph that torch.compile would compile without compiling it (`eager`), which shows that a step is one
graph and that its guards hold; some also show that nothing is written past it (`aot_eager`), and some are compiled by
inductor, slow ones all.
"""

import logging
import shutil

import pytest
import stacks
import tiny
import torch

from decoders import Decoder, Stack, StackError, compiled, loop

SLOW = [
    (("opera",), "greedy"),
    (("prunehal", "opera", "vcd", "dola", "deco"), "beam"),
]
QUICK = [
    ((), "greedy"),
    ((), "beam"),
    (("prunehal",), "greedy"),
    (("prunehal",), "beam"),
    (("opera", "prunehal"), "beam"),
    (("vcd", "prunehal"), "sampling"),
    (("dola",), "greedy"),
    (("deco", "dola"), "beam"),
]
OTHERS = [name for name in stacks.METHODS if not any(name in names for names, _ in QUICK)]
QUICK += [((*OTHERS[i::4], "prunehal"), ("greedy", "beam")[i % 2]) for i in range(4)]  # one graph serves several
AHEAD = [((), "greedy"), (("prunehal",), "beam"), (("vcd", "prunehal"), "sampling"), (("dola",), "greedy")]


def _equal(family, names, search, count=2, new=14):
    inputs, options = tiny.inputs(family, count, seed=4), dict(eos_token_id=stacks.EOS[:1], new=new)
    eager, told = stacks.run(family, names, inputs, search, **options)
    graph, again = stacks.run(family, names, inputs, search, compile="on", **options)
    assert torch.equal(eager.sequences, graph.sequences)
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(graph.logits), atol=2e-3, rtol=1e-4)
    for name, row in told.items():
        if name == "prunehal":
            assert [[p["step"] for p in r["prunes"]] for r in row] == [
                [p["step"] for p in r["prunes"]] for r in again[name]
            ]
        elif name == "restless":
            assert row == again[name]


@pytest.mark.parametrize(
    "names, search, traced",
    [
        *((*case, "aot_eager") for case in AHEAD),
        *((*case, "eager") for case in QUICK if case not in AHEAD),
        *(pytest.param(*case, "aot_eager", marks=pytest.mark.slow) for case in (*QUICK, *SLOW) if case not in AHEAD),
    ],
    indirect=["traced"],
)
def test_it_says_what_the_eager_step_says(names, search, traced):
    _equal("llava", names, search)


@pytest.mark.parametrize("traced", ["eager"], indirect=True)
@pytest.mark.parametrize("names", [("vcd", "dola"), pytest.param(("prunehal", "vcd", "dola"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"llava"}))
def test_every_family_says_what_the_eager_step_says(family, names, traced):
    _equal(family, names, "greedy", count=1)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("names, search", [*QUICK, *SLOW])
def test_compiled_by_inductor_as_well(names, search):
    _equal("llava", names, search)


def test_inductor_compiles_a_beam_search_that_prunes():
    _equal("llava", ("prunehal",), "beam")


def test_a_graph_serves_later_generations_and_larger_pools(traced):
    inputs, options = tiny.inputs("llava", 1), dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    stack = Stack([], compile="on")
    stack.generate(tiny.model("llava"), **inputs, max_new_tokens=150, **options)  # three buckets
    first = stack.compiled["graphs"]
    assert first == 1
    stack.generate(tiny.model("llava"), **inputs, max_new_tokens=150, **options)
    assert stack.compiled["graphs"] == 0
    stack.generate(tiny.model("llava"), **tiny.inputs("llava", 1, seed=9), max_new_tokens=20, compile="off", **options)
    assert stack.compiled is None


@pytest.mark.parametrize("traced", ["eager"], indirect=True)
@pytest.mark.parametrize(
    "names, beams, graphs", [(("vcd", "prunehal", "dola"), 1, 1), (("opera", "prunehal"), 3, 2)], ids=["greedy", "beam"]
)
def test_what_a_step_leaves_behind_is_no_reason_for_another_graph(names, beams, graphs, traced):
    """Neither attention's options, nor hidden states, nor the slots of candidates. Beside OPERA there is one more, for
    beams that have pruned apart.
    """
    stack = Stack([stacks.make(name) for name in names], compile="on")
    options = dict(max_new_tokens=14, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0)
    stack.generate(tiny.model("llava"), **tiny.inputs("llava", 2, seed=4), **options)
    assert stack.compiled["graphs"] == graphs


def test_without_a_compiler_the_package_that_brings_one_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        StackError, match=r"compile=on: .*needs a C\+\+ compiler.*apt install g\+\+.*compile=off runs it"
    ):
        Stack([], compile="on").generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=3)


def test_a_misspelt_mode_is_refused_with_the_nearest():
    with pytest.raises(StackError, match="Unknown compile 'onn'. Did you mean 'on'"):
        Stack([], compile="onn")
    with pytest.raises(StackError, match="Valid: auto, captured, off, on"):
        Stack([]).generate(tiny.model("llava"), **tiny.inputs("llava"), compile="fast")


def test_auto_is_eager_on_a_cpu():
    stack = Stack([], compile="auto")
    stack.generate(tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=4)
    assert stack.compiled is None


class _Breaks(Decoder):
    """Puts into the model what cannot be part of a graph."""

    def model_context(self, model):
        class Context:
            def __enter__(self):
                layer = model.get_decoder().layers[0]
                self.handle = layer.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())

            def __exit__(self, *error):
                self.handle.remove()

        return Context()


def test_what_does_not_compile_is_named_and_auto_goes_on_eagerly(traced, monkeypatch, caplog):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with pytest.raises(StackError, match="the step of LlavaFor.* does not compile: .*compile=off runs it"):
        Stack([_Breaks()], compile="on").generate(model, **inputs, **options)
    monkeypatch.setattr(loop, "choose", lambda *args: compiled.CompiledStep("auto"))
    stack = Stack([_Breaks()], compile="auto")
    with caplog.at_level(logging.WARNING, "decoders"):
        out = stack.generate(model, **inputs, **options)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "decoders"]
    assert "does not compile" in line and "it runs as it is" in line
    assert stack.compiled is None
    assert torch.equal(out, Stack([]).generate(model, **inputs, **options))
