"""What one decoder does to what others, and callers, see."""

from dataclasses import dataclass

import decoder_checks as checks
import pytest
import stacks
import tiny
import torch

from baselines import ICD, M3ID, OPERA, PAI, VTI, DoLa
from decoders import Branch, Decoder, Requirements, Stack, persistent
from prunehal import PruneHal


class InPlace(Decoder):
    """Makes one token impossible, in the tensor that it was given."""

    def process_logits(self, step, state, scores):
        scores[:, 50] = -torch.inf
        return scores


def test_scores_written_in_place_leave_the_models_logits_as_they_are():
    inputs = tiny.inputs("llava", 2)
    out = checks.run("llava", [InPlace(), DoLa([0, 1])], inputs)[0]
    assert torch.isfinite(torch.stack(out.logits)).all()
    assert (torch.stack(out.scores)[..., 50] == -torch.inf).all()


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True, top_k=1)])
def test_visual_tokens_are_found_as_custom_generate_of_a_batch_with_several_rows_an_image(options):
    model, inputs = tiny.model("llava"), tiny.inputs("llava", 2)
    options = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0) | options
    stack = Stack([PruneHal(r=0.7, t=2)])
    expected = stack.generate(model, **inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=stack), expected)
    assert len(stack.record["prunehal"][0]["prunes"])


def test_tokens_kept_are_columns_of_the_prompt_also_beside_a_longer_branch():
    inputs = tiny.inputs("llava", 2)
    visual = [row.nonzero().flatten().tolist() for row in inputs["input_ids"] == tiny.IMAGE]
    beside = checks.run("llava", [ICD(alpha=0, beta=0), PruneHal(r=0.5, t=1)], inputs)[1]["prunehal"]
    branch = ICD(alpha=0.01, beta=0, insert_ids=stacks.INSERTED)
    for row, there, alone in zip(
        checks.run("llava", [branch, PruneHal(r=0.5, t=1)], inputs)[1]["prunehal"], visual, beside, strict=True
    ):
        for kept in row["prunes"][0]["kept"]:
            assert len([i for i in kept if i in there]) == len(there) // 2
        assert row["prunes"][0]["kept"] == alone["prunes"][0]["kept"]


@pytest.mark.parametrize("decoder", [M3ID(lam=0.3, beta=0.05), ICD(alpha=1.0, beta=0.02, insert_ids=stacks.INSERTED)])
def test_branches_of_padded_prompts_need_no_attention_mask(decoder):
    inputs = tiny.inputs("llava", 2)
    assert (inputs["attention_mask"] == 0).any()
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    checks.assert_same(*(checks.run("llava", [decoder], given)[0] for given in (inputs, without)))


def test_skip_prefill_leaves_the_second_run_of_the_last_prompt_token_alone_too():
    def first(*decoders):
        return checks.run("llava", [*decoders, PruneHal(r=0.5, first_token=True)], tiny.inputs("llava", 2), new=2)[0]

    edit = dict(alpha=2.0, gamma=1, start_layer=0)
    plain, skipped, edited = first(), first(PAI(**edit, skip_prefill=True)), first(PAI(**edit))
    torch.testing.assert_close(skipped.logits[0], plain.logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(skipped.logits[1], plain.logits[1], atol=1e-3)
    assert not torch.allclose(edited.logits[0], plain.logits[0], atol=1e-3)


def test_pai_edits_no_branch_of_another_decoder():
    """A branch on the same prompt, whose logits take the place of the scores, says what the model says."""

    class Beside(Decoder):
        def requirements(self, model):
            return Requirements(branch=Branch(inputs=lambda given: {}))

        def process_logits(self, step, state, scores):
            return step.branch

    inputs = tiny.inputs("llava", 2)
    edit = PAI(alpha=2.0, gamma=1, start_layer=0)
    checks.assert_same(checks.run("llava", [edit, Beside()], inputs)[0], checks.run("llava", [], inputs)[0])
    assert checks.differs(checks.run("llava", [edit], inputs)[0], checks.run("llava", [], inputs)[0])


def test_vti_without_a_push_on_the_text_has_nothing_in_the_step():
    for decoder in (VTI(alpha_text=0, alpha_image=0), VTI(stacks.directions("llava"), alpha_text=0, alpha_image=1.0)):
        needs = decoder.requirements(tiny.model("llava"))
        assert needs.constant_forward and not needs.edits


@pytest.mark.parametrize("faithful", [False, True])
def test_opera_that_goes_nowhere_lets_another_go_back(faithful):
    opera = OPERA(penalty=0, threshold=None, num_candidates=4, faithful=faithful)
    inputs = tiny.inputs("llava", 1)
    options = dict(num_beams=3, eos_token_id=None)
    alone, told = checks.run("llava", [stacks.Rewind(6, 3)], inputs, **options)
    both, record = checks.run("llava", [opera, stacks.Rewind(6, 3)], inputs, **options)
    assert told["rewind"] == record["rewind"] and all(record["rewind"])
    assert len(both.sequences[0]) == len(alone.sequences[0])


@dataclass
class _Told:
    times: torch.Tensor = persistent()


def test_states_of_independent_branches_are_told_that_rows_went_back():
    told = []

    class Hears(Decoder):
        def requirements(self, model):
            return Requirements(branch=Branch(inputs=lambda given: {}, pruning="independent"))

        def init_state(self, context):
            state = _Told(torch.zeros(context.rows, dtype=torch.long))
            told.append(state)
            return state

        def select_slots(self, step, state):
            return None

        def on_rollback(self, state, rollback):
            state.times += rollback.rows.long()

    checks.run("llava", [Hears(), stacks.Rewind(4, 2)], tiny.inputs("llava", 2))
    assert [state.times.tolist() for state in told] == [[1, 1], [1, 1]]
