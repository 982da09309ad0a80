"""An exception or Ctrl-C at any moment leaves the model as it was."""

import copy
import functools

import pytest
import stacks
import tiny
import torch

from decoders import Decoder, Stack, hf, rollback
from decoders.beams import BeamSearch, Hypotheses
from decoders.cache_layers import PoolLayer
from decoders.hooks import Hooks
from decoders.kv_pool import SlotTable
from decoders.loop import Generation
from decoders.rollback import History
from decoders.runner import ModelRunner
from decoders.search import SampleSearch
from decoders.states import StateSnapshot

MOMENTS = [
    (Generation, "begin"),
    (Generation, "ask"),
    (Generation, "roll_back"),
    (Hooks, "process_logits"),
    (Hooks, "select_slots"),
    (Hooks, "rescore_candidates"),
    (History, "roll_back"),
    (Generation, "finish"),
    (ModelRunner, "attention"),
    (ModelRunner, "expand"),
    (ModelRunner, "forward_candidates"),
    (ModelRunner, "commit_candidates"),
    (ModelRunner, "rerun"),
    (rollback, "restore_slots"),
    (ModelRunner, "reorder"),
    (ModelRunner, "decode_step"),
    (PoolLayer, "update"),
    (PoolLayer, "resize"),
    (SlotTable, "write"),
    (SlotTable, "keep"),
    (SlotTable, "make_room"),
    (StateSnapshot, "restore"),
    (BeamSearch, "select_next"),
    (BeamSearch, "restore"),
    (Hypotheses, "update"),
    (SampleSearch, "select_next"),
    (Decoder, "on_rollback"),
]
NAMES = ("prunehal", "opera", "vcd", "dola", "deco")


def _fingerprint(model):
    """What a generation could leave behind: attention function, hooks, configs, attributes of modules."""
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    attributes = {name: sorted(k for k in vars(m) if k != "rope_deltas") for name, m in model.named_modules()}
    return (
        model.config.to_dict(),
        hf.attention_name(model),
        copy.deepcopy(model.generation_config.to_dict()),
        hooks,
        attributes,
    )


@functools.cache
def _undisturbed(family, names, search):
    """What a stack, and `generate`, say where nothing fails."""
    model, inputs = tiny.model(family), tiny.inputs(family, 2)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return stacks.run(family, names, inputs, search, new=14)[0], plain


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(RuntimeError, marks=pytest.mark.slow)])
@pytest.mark.parametrize("owner, method", MOMENTS, ids=lambda x: getattr(x, "__name__", x))
def test_the_model_is_left_as_it_was(owner, method, error, monkeypatch):
    family = "qwen25vl" if error is RuntimeError else "llava"
    model, inputs = tiny.model(family), tiny.inputs(family, 2)
    search = "greedy" if owner is SampleSearch else "beam"
    if (owner, method) in ((ModelRunner, "reorder"), (ModelRunner, "decode_step")):
        names = ("prunehal", "vcd")
    else:
        names = NAMES
    expected, plain = _undisturbed(family, names, search)
    before = _fingerprint(model)
    owner = stacks.Restless if owner is Decoder else owner
    real, calls = getattr(owner, method), []
    last = [0]

    def counted(*args, **kwargs):
        last[0] += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, counted)
        stacks.run(family, names, inputs, search, new=14)
    assert last[0], "this moment never comes in this generation"
    for moment in sorted({1, (last[0] + 1) // 2, last[0]}):  # the first time, one in the middle, the last
        calls.clear()

        def failing(*args, moment=moment, **kwargs):
            calls.append(1)
            if len(calls) == moment:
                raise error("in the middle")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, failing)
            with pytest.raises(error, match="in the middle"):
                stacks.run(family, names, inputs, search, new=14)
        assert _fingerprint(model) == before
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0), plain)
    again, _ = stacks.run(family, names, inputs, search, new=14)
    assert torch.equal(again.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(expected.logits), rtol=0, atol=0)


def test_an_error_in_the_model_itself_also_leaves_it_as_it_was():
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    before, calls = _fingerprint(model), []
    block = model.get_decoder().layers[1]

    def fail(module, args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = block.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            stacks.run("llava", NAMES, inputs, "beam")
    finally:
        handle.remove()
    assert _fingerprint(model) == before


def test_a_hook_that_writes_into_its_state_is_told_so():
    class Writes(stacks.Rewind):
        def init_state(self, context):
            return {"once": super().init_state(context), "seen": torch.zeros(context.rows, 3)}

        def rescore_candidates(self, step, candidates, state, scores):
            state["seen"] += 1.0
            return super().rescore_candidates(step, candidates, state["once"], scores)

        def on_rollback(self, state, rollback):
            super().on_rollback(state["once"], rollback)

    with pytest.raises(ValueError, match="wrote into a tensor"):
        Stack([Writes(5, 2)]).generate(
            tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=8, do_sample=False, eos_token_id=None
        )


def test_a_state_that_is_not_row_first_is_told_so():
    class Odd(Decoder):
        def init_state(self, context):
            return torch.zeros(7, context.rows)

    with pytest.raises(ValueError, match="odd: tensors of a state are row-first"):
        Stack([Odd()]).generate(
            tiny.model("llava"), **tiny.inputs("llava"), max_new_tokens=4, do_sample=False, num_beams=2
        )
