"""MemVR against the method written out, and what every decoder must keep."""

import decoder_checks as checks
import pytest
import tiny
import torch
from references.oracles import memvr, plain

from baselines import MemVR
from decoders import Branch, Decoder, RawInputs, Requirements, Stack, StackError

# random models are unsure of everything: with these, some rows and tokens look after one block, some after another
THRESHOLDS = {"llava": 0.97, "qwen25vl": 0.98, "internvl": 0.9945}
CASES = [
    (dict(ratio=0.3, threshold=0.8, start=-1, end=3), 14),
    (dict(ratio=0.5, threshold=0.9, start=-1, end=3), 12),
    (dict(ratio=0.5, threshold=0.75, start=0, end=3), 20),
    (dict(ratio=0.12, threshold=0.5, start=0, end=2), 20),
    (dict(ratio=1.0, threshold=0.85, start=0, end=4), 8),
]


def acting(family="llava"):
    return MemVR(ratio=0.6, threshold=THRESHOLDS[family], start=-1, end=2)


def test_it_says_what_a_plain_loop_says():
    different, unsure = 0, []
    for seed in range(4):
        model, inputs = plain.tiny(seed)
        without = plain.plain(model, inputs, 20)
        for options, length in CASES:
            bounds, rest = (options["start"], min(options["end"], 3)), {k: options[k] for k in ("ratio", "threshold")}
            expected = memvr.oracle(model, inputs, length, bounds=bounds, report=unsure, **rest)
            out = Stack([MemVR(**options)]).generate(model, **inputs, max_new_tokens=length, do_sample=False)
            assert out[0, inputs["input_ids"].shape[1] :].tolist() == expected, (seed, options)
            different += expected != without[:length]
    assert different > 0.75 * 4 * len(CASES)
    assert {tuple(blocks) for blocks in unsure} == {(), (0,), (1,), (2,)}


def test_bounds_are_the_same_shares_of_depth():
    assert MemVR().blocks(32) == range(6, 16)
    assert MemVR().blocks(28) == range(5, 14)
    assert MemVR().blocks(3) == range(1, 2)
    assert MemVR(start=9).blocks(32) == range(10, 16)
    assert MemVR(start=0, end=9).blocks(4) == range(1, 3)  # the last block has none after it
    for depth in (32, 40, 28):
        start, end = memvr.late(depth)
        assert MemVR().blocks(depth) == range(start + 1, end)


@pytest.mark.parametrize("search", ["greedy", "beam"])
@pytest.mark.parametrize("neutral", [dict(ratio=0), dict(threshold=1)], ids=str)
def test_neutral_settings_change_nothing(neutral, search):
    checks.assert_asks_for_nothing(MemVR(**neutral), "llava")
    hardly = dict(ratio=0.5, threshold=0.9999, start=-1, end=2)  # it asks, and nothing is as unsure as that
    checks.assert_changes_nothing(MemVR(**hardly), "llava", search)


@pytest.mark.parametrize("beside", [None, "prunehal", "opera", "vcd"])
@pytest.mark.parametrize("family", THRESHOLDS)
def test_rows_that_look_after_different_blocks_say_what_they_say_alone(family, beside):
    search = "beam" if beside == "opera" else "greedy"
    checks.assert_acts_the_same_in_a_batch(lambda: acting(family), family, search, beside)


def test_padding_counts_for_nothing():
    """Whatever token stands there; that of these models has no embedding, so that it would count for nothing anyway."""
    inputs = tiny.inputs("llava", 3, seed=2)
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 33)}
    one, two = (checks.run("llava", [acting()], each)[0] for each in (inputs, other))
    torch.testing.assert_close(one.scores[0], two.scores[0], atol=2e-3, rtol=1e-3)


class _Beside(Decoder):
    """A branch, whose first logits it keeps."""

    def __init__(self, branch):
        self.branch = branch

    def requirements(self, model):
        return Requirements(branch=self.branch)

    def process_logits(self, step, state, scores):
        self.seen = step.branch if step.max_num_forwards == 1 else self.seen
        return scores


def test_a_branch_looks_at_its_own_picture():
    """At those of the other prompt, it says what the main rows say of them."""
    inputs = tiny.inputs("llava", 2)
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    beside = _Beside(Branch(inputs=lambda given: {"pixel_values": given.tensors["pixel_values"].flip(0)}))
    checks.run("llava", [acting(), beside], inputs)
    expected = checks.run("llava", [acting()], swapped)[0].logits[0]
    torch.testing.assert_close(beside.seen, expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(expected, checks.run("llava", [], swapped)[0].logits[0], atol=0.1)


def test_a_branch_without_a_picture_does_not_look():
    inputs = tiny.inputs("llava", 2)
    seen = []
    for more in ([], [acting()]):
        beside = _Beside(Branch(inputs=RawInputs.without_images, pruning="none", images=False))
        checks.run("llava", [*more, beside], inputs, new=4)
        seen.append(beside.seen)
    assert torch.isfinite(seen[1]).all()
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(ratio=1.5), r"memvr: ratio is a number in \[0, 1\], not 1.5; the nearest valid value is 1"),
        (dict(threshold=-0.1), r"threshold is a number in \[0, 1\]"),
        (dict(start=1.5), "start is an integer >= -1 or none"),
        (dict(end=-2), "end is an integer >= 0 or none"),
    ],
)
def test_options_out_of_range_are_refused(bad, words):
    with pytest.raises(StackError, match=words):
        MemVR(**bad)


def test_what_a_model_cannot_offer_is_refused():
    why = Stack([MemVR(start=1)]).refusals(tiny.model("llava"))["memvr"]
    assert why.startswith("memvr: no block of this model's 3 lies between start=1 and end=2 and has another one after")
    with pytest.raises(StackError, match="between start=1 and end=2"):
        MemVR().blocks(4)
