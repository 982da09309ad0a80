"""What decoders of one stack are shown, and how their answers are joined: each by what it asked for itself."""

from dataclasses import dataclass

import pytest
import stacks
import tiny
import torch

from decoders import Branch, Decoder, Requirements, Stack, StackError

OPTIONS = dict(
    max_new_tokens=6,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_logits=True,
    output_scores=True,
)


def generate(decoders, inputs):
    return Stack(decoders).generate(tiny.model("llava"), **inputs, **OPTIONS)


def every_other(visual):
    """bool [l or 1, n, t]: the 2nd, 4th, ... visual token of each row."""
    return visual & (visual.cumsum(-1) % 2 == 0)


# rows in which a decoder has nothing to drop


@dataclass
class DropsWhereItWants(Decoder):
    """Wants to drop in some rows, and answers for all of them."""

    wants: tuple[bool, ...]

    def requirements(self, model):
        return Requirements(visual=True)

    def wants_to_prune(self, step, state):
        return torch.tensor(self.wants)

    def select_slots(self, step, state):
        return ~every_other(step.visual)


@pytest.mark.parametrize("company", [[], [stacks.Rewind(99, 1)]], ids=["alone", "lookahead"])
def test_select_slots_drops_nothing_in_rows_that_their_decoder_does_not_want_to_prune(company):
    inputs = tiny.inputs("llava", 3)
    plain, all_rows = (
        torch.stack(generate([*company, *more], inputs).logits) for more in ([], [DropsWhereItWants((True,) * 3)])
    )
    some = torch.stack(
        generate(
            [*company, DropsWhereItWants((True, False, False)), DropsWhereItWants((False, False, True))], inputs
        ).logits
    )
    torch.testing.assert_close(some[:, 1], plain[:, 1], atol=2e-3, rtol=1e-4)
    assert not torch.allclose(all_rows[:, [0, 2]], plain[:, [0, 2]], atol=1e-2)


# branches whose prompt differs


@dataclass
class BesideAnotherPrompt(Decoder):
    """Contrasts with a prompt that lacks two tokens behind the picture, so that the picture stands two slots later."""

    pruning: str

    def requirements(self, model):
        return Requirements(visual=True, branch=Branch(inputs=self.inputs, pruning=self.pruning))

    def inputs(self, given):
        end = int((given.tensors["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
        return {
            name: torch.cat([given.tensors[name][:, :end], given.tensors[name][:, end + 2 :]], 1)
            for name in ("input_ids", "attention_mask")
        }

    def process_logits(self, step, state, scores):
        return step.branch

    def attention_bias(self, cache, state):
        return every_other(cache.visual) * -3.0


def test_attention_bias_of_a_mirrored_branch_with_another_prompt_goes_by_the_ordinals_of_visual_tokens():
    """As where the branch itself weakens the same visual tokens of its own prompt."""
    inputs = tiny.inputs("llava", 2, ragged=False)
    mirrored, own, untouched = (
        torch.stack(generate([BesideAnotherPrompt(pruning)], inputs).scores)
        for pruning in ("mirror", "independent", "none")
    )
    torch.testing.assert_close(mirrored, own, atol=2e-3, rtol=1e-4)
    assert not torch.allclose(untouched, own, atol=1e-2)


# what each asked for


@dataclass
class LooksAhead(Decoder):
    """Notes the shapes of the candidates that it is shown."""

    count: int

    def requirements(self, model):
        return Requirements(lookahead=self.count, attention=(0,))

    def init_state(self, context):
        return []

    def rescore_candidates(self, step, candidates, state, scores):
        assert candidates.attention is not None
        shapes = (candidates.tokens.shape, candidates.scores.shape, candidates.attention.shape[1:3])
        state.append([tuple(shape) for shape in shapes])
        return scores, None

    def record(self, state):
        return state


def test_rescore_candidates_shows_each_decoder_as_many_as_it_asked_for():
    inputs, stack = tiny.inputs("llava", 2), Stack([LooksAhead(2), LooksAhead(5)])
    stack.generate(tiny.model("llava"), **inputs, **OPTIONS)
    for name, count in (("looksahead", 2), ("looksahead_2", 5)):
        assert stack.record[name] == [[(2, count)] * 3] * OPTIONS["max_new_tokens"]


class ReadsVisual(Decoder):
    """Reads visual slots that it did not ask for."""

    def process_logits(self, step, state, scores):
        assert step.visual is not None
        return scores


def test_view_leaves_out_visual_slots_that_only_another_decoder_asked_for():
    with pytest.raises(StackError, match="visual of a Step was not requested"):
        generate([DropsWhereItWants((True,)), ReadsVisual()], tiny.inputs("llava"))


# a decoder given twice


@pytest.mark.parametrize("second", [LooksAhead(2), None], ids=["equal", "itself"])
def test_stack_refuses_a_decoder_given_twice_and_takes_two_with_different_options(second):
    first = LooksAhead(2)
    with pytest.raises(StackError, match="looksahead is given twice with the same options"):
        Stack([first, DropsWhereItWants((True,)), second or first])
    Stack([LooksAhead(2), LooksAhead(3)])
    Stack([DropsWhereItWants((torch.ones(2),)), DropsWhereItWants((torch.ones(2),))])  # tensors are not compared


# errors


@dataclass
class Fails(Decoder):
    """Raises in one hook, from one forward on."""

    hook: str
    step: int = 1

    def requirements(self, model):
        ahead = self.hook == "rescore_candidates"
        return Requirements(visual=True, lookahead=2 if ahead else 0, reruns_last_token="after" in self.hook)

    def _fail(self, hook, step=None):
        if hook == self.hook and (step is None or step.max_num_forwards >= self.step):
            raise RuntimeError("broken")

    def init_state(self, context):
        return self._fail("init_state")

    def process_logits(self, step, state, scores):
        return self._fail("process_logits", step) or scores

    def rescore_candidates(self, step, candidates, state, scores):
        return self._fail("rescore_candidates", step) or (scores, None)

    def wants_to_prune(self, step, state):
        return self._fail("wants_to_prune", step)

    def select_slots(self, step, state):
        return self._fail("select_slots", step)

    def select_slots_after_prefill(self, step, state):
        return self._fail("select_slots_after_prefill", step)

    def attention_bias(self, cache, state):
        return self._fail("attention_bias")


@pytest.mark.parametrize(
    "hook, at",
    [
        ("init_state", ""),
        ("process_logits", ", step 3"),
        ("rescore_candidates", ", step 3"),
        ("wants_to_prune", ", step 3"),
        ("select_slots", ", step 3"),
        ("select_slots_after_prefill", ", step 1"),
        ("attention_bias", ""),
    ],
)
def test_an_error_says_in_whose_hook_and_at_which_step_it_was_raised(hook, at):
    failing = Fails(hook, 1 if at.endswith("1") else 3)
    with pytest.raises(RuntimeError, match="broken") as error:
        generate([LooksAhead(2), failing], tiny.inputs("llava"))
    assert error.value.__notes__ == [f"in decoder 'fails', hook {hook}{at}"]
