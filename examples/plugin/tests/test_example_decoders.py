"""What every decoder must keep, on tiny random models."""

import decoder_checks
import pytest
import tiny
import torch
from example_decoders.ritual import RITUAL, VIEWS
from example_decoders.spotlight import Spotlight

from prunehal import StackError

FAMILY = "llava"
ACTING = {"ritual": lambda: RITUAL(alpha=1.0), "spotlight": lambda: Spotlight(boost=2.0)}
NEUTRAL = {"ritual": lambda: RITUAL(alpha=0), "spotlight": lambda: Spotlight(boost=0)}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_change_nothing(name):
    decoder_checks.assert_changes_nothing(NEUTRAL[name](), FAMILY, "beam")


@pytest.mark.parametrize("beside", [None, "prunehal"])
@pytest.mark.parametrize("name", ACTING)
def test_a_batch_says_what_each_says_alone(name, beside):
    decoder_checks.assert_acts_the_same_in_a_batch(ACTING[name], FAMILY, "greedy", beside)


@pytest.mark.parametrize("name", ACTING)
def test_steps_compile(name, monkeypatch):
    decoder_checks.assert_compiles(ACTING[name], FAMILY, "greedy", monkeypatch)


def test_scores_are_those_of_both_views():
    """Of the first token, which no earlier choice sets apart."""
    inputs, decoder = tiny.inputs(FAMILY, 1), RITUAL(alpha=0.5, view="upside_down")
    seen = inputs | {"pixel_values": inputs["pixel_values"].flip(-2)}
    picture, view, both = (
        decoder_checks.run(FAMILY, stack, given, new=1)[0].scores[0]
        for stack, given in (([], inputs), ([], seen), ([decoder], inputs))
    )
    torch.testing.assert_close(both, picture + 0.5 * view, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_another_picture_and_the_same_for_the_same_seed(view):
    picture = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, again = (RITUAL(view=view)._seen(picture, seed=4) for _ in range(2))
    assert torch.equal(first, again) and first.shape == picture.shape and not torch.allclose(first, picture, atol=0.01)


def test_what_cannot_be_is_refused():
    with pytest.raises(StackError, match="one picture a prompt"):  # here pictures come as patches
        decoder_checks.run("qwen25vl", [RITUAL()], tiny.inputs("qwen25vl", 1), new=2)
    with pytest.raises(StackError, match="Did you mean 'mirror'"):
        RITUAL(view="miror")
