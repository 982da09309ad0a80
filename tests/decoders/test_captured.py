"""Steps replayed from recordings say what eager ones say. No GPU is needed: a stand-in for CUDA runs a step again over
the same static buffers, and writes what it shows over what it showed before.
"""

import logging
from types import SimpleNamespace

import pytest
import stacks
import tiny
import torch

from baselines import ONLY, PAI, VISTA, VTI, MemVR
from baselines.vti_directions import Directions
from decoders import Decoder, Requirements, Stack, StackError, captured, compiled, loop

OPTIONS = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


class Rerun(captured.Recorder):
    """Stands in for CUDA. What is recorded is not run; a replay reads the static inputs, writes the static outputs, and
    needs the pool to lie where it lay.
    """

    def __init__(self):
        self.recorded, self.replayed, self.aside_first = [], 0, False

    def aside(self, run):
        self.aside_first = True
        run()

    def record(self, run):
        assert self.aside_first
        self.aside_first, shown = False, run()
        for x in self._tensors(shown):
            x.fill_(torch.nan)
        self.recorded.append(SimpleNamespace(run=run, shown=shown, pool=self._pool(run)))
        return self.recorded[-1], shown

    def replay(self, recording):
        assert self._pool(recording.run) == recording.pool, "it writes into memory that was freed"
        self.replayed += 1
        new = recording.run()
        for old, x in zip(self._tensors(recording.shown), self._tensors(new), strict=True):
            old.copy_(x)

    @staticmethod
    def _tensors(shown):
        rows = [x for found in shown.rows.values() for x in found.values()]
        return [shown.logits, *shown.queries.values(), *shown.hidden.values(), *rows]

    @staticmethod
    def _pool(run):
        step = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, captured._Step))
        return step.buffers()


@pytest.fixture
def recorder(monkeypatch):
    """With `compile="captured"` steps are captured, by a stand-in, as they would be on a GPU."""
    one, real = Rerun(), loop.choose

    def choose(mode, *args):
        return captured.CapturedStep(mode, one) if mode == "captured" else real(mode, *args)

    monkeypatch.setattr(loop, "choose", choose)
    return one


def _equal(family, names, search, recorder, count=2, new=14):
    inputs, options = tiny.inputs(family, count, seed=4), dict(eos_token_id=stacks.EOS[:1], new=new)
    eager, told = stacks.run(family, names, inputs, search, **options)
    again, record = stacks.run(family, names, inputs, search, compile="captured", **options)
    assert torch.equal(eager.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(again.logits), atol=2e-3, rtol=1e-4)
    assert recorder.replayed > len(recorder.recorded) > 0
    for name in {"prunehal", "restless"} & set(told):
        key = "prunes" if name == "prunehal" else "rollbacks"
        assert [[e["step"] if key == "prunes" else e for e in r[key]] for r in told[name]] == [
            [e["step"] if key == "prunes" else e for e in r[key]] for r in record[name]
        ]


CASES = [
    ((), "greedy"),
    ((), "beam"),
    (("prunehal",), "greedy"),
    (("prunehal",), "beam"),
    (("opera",), "greedy"),
    (("opera", "prunehal"), "beam"),
    (("vcd", "prunehal"), "sampling"),
    (("dola",), "greedy"),
    (("prunehal", "opera", "vcd", "dola", "deco"), "greedy"),
]
OTHERS = [name for name in stacks.METHODS if not any(name in names for names, _ in CASES)]
CASES += [((name, "prunehal"), ("beam", "greedy")[i % 2]) for i, name in enumerate(OTHERS)]


@pytest.mark.parametrize("names, search", CASES)
def test_it_says_what_the_eager_step_says(names, search, recorder):
    _equal("llava", names, search, recorder)


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_hooks_inside_the_forward_are_recorded_with_it(search, recorder):
    """PAI changes attention in a branch of another prompt; PruneHal reads the rows that it changes."""
    inputs = tiny.inputs("llava", 2, seed=4)
    options = dict(max_new_tokens=70, eos_token_id=None, pad_token_id=0, **stacks.SEARCHES[search])
    options |= dict(return_dict_in_generate=True, output_logits=True)

    def run(*decoders, compile="off"):
        return Stack(list(decoders), compile=compile).generate(tiny.model("llava"), **inputs, **options)

    pai, prunehal = PAI(alpha=0.5, start_layer=0), lambda: stacks.make("prunehal")
    eager, again = run(pai, prunehal()), run(pai, prunehal(), compile="captured")
    assert torch.equal(eager.sequences, again.sequences) and recorder.replayed > len(recorder.recorded) > 1
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(again.logits), atol=2e-3, rtol=1e-4)
    assert not torch.equal(eager.logits[-1], run(prunehal()).logits[-1])


@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: VISTA(lam=0.4),
        lambda: VTI(Directions(torch.eye(3, 48)), 3.0, 0),
        lambda: MemVR(ratio=0.6, threshold=0.97, start=-1, end=2),
        lambda: ONLY(gamma=0.8, layer=1),
    ],
    ids=["vista", "vti", "memvr", "only"],
)
def test_what_is_read_and_handed_on_inside_is_recorded_with_the_forward(make, search, recorder):
    """What was found before the prefill of each image, put on the device or kept as that ran; what a step exports."""
    inputs, options = tiny.inputs("llava", 2, seed=4), OPTIONS | stacks.SEARCHES[search]
    eager, again, plain = (
        Stack(decoders, compile=mode).generate(tiny.model("llava"), **inputs, max_new_tokens=40, **options)
        for decoders, mode in (([make()], "off"), ([make()], "captured"), ([], "off"))
    )
    assert torch.equal(eager, again) and recorder.replayed > len(recorder.recorded) > 0
    assert not torch.equal(eager, plain)


class _Ahead(Decoder):
    """Runs one candidate a row, in a forward of the shapes of a step."""

    def requirements(self, model):
        return Requirements(lookahead=1)


def test_steps_and_candidates_of_their_shapes_are_recorded_apart_where_early_logits_are_read(recorder):
    """A token that is not the candidate that was run has a step of its own, which makes early logits; candidates do
    not.
    """
    inputs = tiny.inputs("llava", 2, seed=4)
    options = OPTIONS | dict(do_sample=True, max_new_tokens=30, return_dict_in_generate=True, output_logits=True)

    def run(mode):
        torch.manual_seed(3)
        decoders = [stacks.make("dola"), _Ahead()]
        return Stack(decoders, compile=mode).generate(tiny.model("llava"), **inputs, **options)

    eager, again = run("off"), run("captured")
    assert torch.equal(eager.sequences, again.sequences)
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(again.logits), atol=2e-3, rtol=1e-4)
    rows = {one.shown.logits.shape[:2].numel() for one in recorder.recorded}
    assert len(rows) == 2 and recorder.replayed > len(recorder.recorded)


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"llava"}))
def test_every_family_says_what_the_eager_step_says(family, recorder):
    _equal(family, ("prunehal", "vcd", "dola"), "greedy", recorder, count=1)


def test_buffers_are_reused_and_a_new_pool_is_recorded_anew(recorder):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    stack = Stack([], compile="captured")
    out = stack.generate(model, **inputs, max_new_tokens=150, **OPTIONS)  # three buckets
    assert torch.equal(out, Stack([]).generate(model, **inputs, max_new_tokens=150, **OPTIONS))
    assert len(recorder.recorded) == len({one.pool for one in recorder.recorded}) == 3 and recorder.replayed == 149
    assert stack.compiled["graphs"] == 3 and stack.compiled["seconds"] > 0


def test_only_a_gpu_captures_and_what_cannot_be_captured_is_named():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    with pytest.raises(StackError, match="compile=captured: CUDA graphs need a GPU, .* is on cpu. compile=off runs it"):
        Stack([], compile="captured").generate(model, **inputs, max_new_tokens=3, **OPTIONS)
    on_gpu = dict(pooled=True, recurrent=[], takes_positions=True, a_row_a_sequence=False)

    def why(changing=(), shown=False, **facts):
        fake = SimpleNamespace(device=torch.device("cuda"), modules=lambda: [])
        return captured.not_capturable(SimpleNamespace(model=fake, **{**on_gpu, **facts}), shown, list(changing))

    assert why() is None
    assert "not the loop's own" in why(pooled=False)
    assert "running states" in why(recurrent=[1])
    assert "length of its cache" in why(takes_positions=False)
    assert "output_attentions" in why(shown=True) and "output_attentions" in why(a_row_a_sequence=True)
    assert "shift and other may do other things inside the forward" in why(["shift", "other"])


class _Shifts(Decoder):
    """Adds to what a block gets, by a hook that torch.compile does not follow."""

    def __init__(self, constant: bool):
        self.constant = constant

    def requirements(self, model):
        return Requirements(constant_forward=self.constant)

    def model_context(self, model):
        class Context:
            def __enter__(self):
                self.shift = torch.full((), 0.3)
                layer = model.get_decoder().layers[1]
                self.handle = layer.register_forward_pre_hook(self.add)

            def add(self, module, args):
                torch._dynamo.graph_break()
                return (args[0] + self.shift, *args[1:])

            def __exit__(self, *error):
                self.handle.remove()

        return Context()


@pytest.mark.parametrize("constant", [True, False])
def test_auto_captures_what_does_not_compile(constant, monkeypatch, caplog):
    """As on a GPU: the device alone is not asked."""
    one, seen = Rerun(), []

    def choose(mode, runner, new, shown, changing):
        seen.append(changing)
        instead = captured.CapturedStep("auto", one) if not changing else None
        return compiled.CompiledStep("auto", instead=instead) if mode == "auto" else None

    monkeypatch.setattr(loop, "choose", choose)
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 1)
    stack = Stack([_Shifts(constant)], compile="auto")
    with caplog.at_level(logging.WARNING, "decoders"):
        out = stack.generate(model, **inputs, max_new_tokens=12, **OPTIONS)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "decoders"]
    assert seen == [[] if constant else ["_shifts"]]
    assert "does not compile" in line and ("captured as a CUDA graph" in line) == constant
    assert (stack.compiled is not None) == constant == bool(one.replayed)
    expected = Stack([_Shifts(constant)]).generate(model, **inputs, max_new_tokens=12, **OPTIONS)
    assert torch.equal(out, expected)
    assert not torch.equal(out, Stack([]).generate(model, **inputs, max_new_tokens=12, **OPTIONS))


class _Fails(Rerun):
    def record(self, run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    monkeypatch.setattr(loop, "choose", lambda mode, *args: mode != "off" and captured.CapturedStep(mode, _Fails()))
    stack = Stack([stacks.make("opera"), stacks.make("dola")], compile="auto")
    with caplog.at_level(logging.WARNING, "decoders"):
        out = stack.generate(model, **inputs, max_new_tokens=12, **OPTIONS)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "decoders"]
    assert line.endswith("cannot be captured: operation not permitted when stream is capturing; it runs as it is")
    assert stack.compiled is None
    eager = Stack([stacks.make("opera"), stacks.make("dola")])
    monkeypatch.undo()
    assert torch.equal(out, eager.generate(model, **inputs, max_new_tokens=12, **OPTIONS))


def test_a_step_that_never_repeats_is_given_up(recorder, monkeypatch):
    monkeypatch.setattr(captured, "MOST", 1)
    with pytest.raises(StackError, match="cannot be captured: 1 recordings were made for one pool.*compile=off"):
        stack = Stack([stacks.make("opera")], compile="captured")
        stack.generate(tiny.model("llava"), **tiny.inputs("llava", 1), max_new_tokens=14, **OPTIONS)
