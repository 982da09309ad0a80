"""The decoder that notes where the model looks: it changes nothing, and what it tells is what an eager model shows."""

import functools

import pytest
import torch

from baselines import VCD
from decoders import Decoder, Requirements, Stack
from experiments import models
from experiments.probes.watch import Watch
from experiments.scenes import evaluate, language, world
from prunehal import PruneHal


@functools.cache
def speaker(count=2):
    model, processor = models.load(models.entry("scenes"))
    return model, models.encode(
        processor,
        [world.render(s) for s in evaluate.scenes("validation", "typical", count)],
        language.CAPTION_PROMPT,
        "cpu",
    )


def told(decoders, watch=None, inputs=None, **options):
    """What was generated, and the record of a stack with the recorder."""
    model, given = speaker()
    stack = Stack([*decoders, watch or Watch(maps=8)])
    out = stack.generate(model, **(inputs or given), **{"max_new_tokens": 12, "do_sample": False} | options)
    return out[:, given["input_ids"].shape[1] :], stack.record


def shown(out):
    """Attention of an eager model to the visual tokens as it reads prompts and answers, [b, l, positions, p], from the
    last position of the prompt on.
    """
    model, inputs = speaker()
    ids = torch.cat([inputs["input_ids"], out], 1)
    model.set_attn_implementation("eager")
    try:
        attention = model(
            **inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, output_attentions=True
        ).attentions
    finally:
        model.set_attn_implementation("sdpa")
    start, visual = inputs["input_ids"].shape[1], inputs["input_ids"] == model.config.image_token_id
    return [
        torch.stack([layer[i, :, start - 1 :].mean(0)[:, :start][:, visual[i]] for layer in attention])
        for i in range(len(ids))
    ]


def close(seen, expected):
    assert seen.shape == expected.shape and torch.allclose(seen.float(), expected, atol=2e-5, rtol=2e-3), (
        (seen.float() - expected).abs().max()
    )


@pytest.mark.parametrize("beams", [1, 2])
def test_it_changes_nothing_and_sees_what_the_eager_model_shows(beams):
    """Under beams: the steps of the beam that was returned, as if its tokens had been forced."""
    out, record = told([], num_beams=beams)
    model, inputs = speaker()
    assert out.equal(
        Stack([]).generate(model, **inputs, max_new_tokens=12, do_sample=False, num_beams=beams)[
            :, inputs["input_ids"].shape[1] :
        ]
    )
    for row, seen, tokens in zip(record["watch"], shown(out), out.tolist(), strict=False):
        assert row["tokens"][1:] == tokens[:-1] and row["layers"] == [1] * 8 and row["maps"].shape == (12, 8, 196)
        close(row["maps"], seen[:, :12].transpose(0, 1))
        assert row["left"].eq(1).all()


def test_layers_are_joined_by_their_mean():
    _, whole = told([])
    _, joined = told([], Watch(maps=3))
    assert joined["watch"][0]["layers"] == [3, 3, 2]
    close(
        joined["watch"][0]["maps"],
        torch.stack([part.mean(1) for part in whole["watch"][0]["maps"].float().split([3, 3, 2], 1)], 1),
    )


def test_what_was_pruned_is_gone_from_then_on_and_nothing_else():
    out, record = told([PruneHal()])
    model, inputs = speaker()
    for row, pruned, seen, visual in zip(
        record["watch"],
        record["prunehal"],
        shown(out),
        inputs["input_ids"] == model.config.image_token_id,
        strict=False,
    ):
        prunes = pruned["prunes"]
        assert len(prunes) >= 2 and prunes[0]["step"] == 2
        close(row["maps"][:1], seen[:, :1].transpose(0, 1))  # the first prune is before the second forward
        places = visual.nonzero().flatten().tolist()
        for m in range(1, 13):
            last = [prune["kept"] for prune in prunes if prune["step"] <= m][-1:]
            for layer in range(8):
                kept = (
                    torch.tensor([place in last[0][layer] for place in places])
                    if last
                    else torch.ones(196, dtype=torch.bool)
                )
                assert row["left"][m - 1, layer].bool().equal(kept)
                assert not row["maps"][m - 1, layer][~kept].any() and row["maps"][m - 1, layer][kept].any()


class Again(Decoder):
    """Goes back once, from five tokens to two, and then forbids what was chosen there."""

    def requirements(self, model):
        return Requirements(lookahead=3, rollback=True)

    def init_state(self, context):
        self.went, self.banned = False, None

    def rescore_candidates(self, step, candidates, state, scores):
        if self.banned is not None and step.max_num_forwards == 3:
            scores = scores.scatter(1, self.banned[:, None], -torch.inf)
        if self.went or step.max_num_forwards < 6:
            return scores, None
        self.went, self.banned = True, step.input_ids[:, -3]
        return scores, torch.full_like(step.num_forwards, 2)


def test_what_was_taken_back_is_written_over():
    plain, _ = told([])
    out, record = told([Again()])
    assert out[:, :2].equal(plain[:, :2]) and (out[:, 2] != plain[:, 2]).all()
    for row, seen, tokens in zip(record["watch"], shown(out), out.tolist(), strict=False):
        assert row["tokens"][1:] == tokens[:-1]
        close(row["maps"], seen[:, :12].transpose(0, 1))


def test_beside_other_decoders():
    """With prunes, a rollback and beams, and another branch: what is noted belongs to what was returned."""
    for decoders, options in (([again := Again(), PruneHal()], {"num_beams": 2}), ([VCD(), PruneHal()], {})):
        out, record = told(decoders, max_new_tokens=9, **options)
        for row, pruned, tokens in zip(record["watch"], record["prunehal"], out.tolist(), strict=False):
            assert row["tokens"][1:] == tokens[: len(row["tokens"]) - 1] and len(row["tokens"]) == 9
            for m, left in enumerate(row["left"].sum(-1)[:, 0].tolist(), 1):
                assert left == next((len(p["kept"][0]) for p in reversed(pruned["prunes"]) if p["step"] <= m), 196)
    assert again.went


@pytest.mark.parametrize("decoders", [[], [PruneHal()]], ids=["alone", "pruned"])
def test_sums_are_those_of_the_maps(decoders):
    _, whole = told(decoders)
    _, summed = told(decoders, Watch())
    for row, sums in zip(whole["watch"], summed["watch"], strict=True):
        found = torch.tensor(sums["row"]["attention_by_layer"])
        assert found.shape == (11, 8)  # all but the last of 12 forwards
        close(found, row["maps"].float().sum(-1)[:-1])
