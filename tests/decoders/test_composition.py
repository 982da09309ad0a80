"""The properties of every stack: each decoder alone, every pair, and larger stacks, under every search, alone and in a
batch.
"""

import functools
import itertools
from collections import Counter

import pytest
import stacks
import tiny
import torch
from acting import all_watched

from baselines import VCD
from decoders import Stack, StackError, hf
from decoders.cache_layers import in_buckets
from decoders.kv_pool import SlotTable
from decoders.runner import ModelRunner
from prunehal import PruneHal

FAMILIES = ("llava", "qwen25vl")


def _matrix(*searches):
    """Every stack on both families under every search. Quick is each small stack on one family and under one search:
    those under which fewest of its decoders, and fewest stacks, were before; the rest is slow.
    """
    turns, quick, uses = list(itertools.product(FAMILIES, searches)), {}, Counter()
    for names in stacks.quick():
        quick[names] = min(
            turns, key=lambda turn: (sum(uses[pair] > 0 for pair in itertools.product(names, turn)), uses[turn])
        )
        uses.update([quick[names], *itertools.product(names, quick[names])])
    return [
        pytest.param(
            *(family, names, search),
            marks=[] if quick.get(names) == (family, search) else [pytest.mark.slow],
            id=f"{family}-{search}-{'+'.join(names) or 'empty'}",
        )
        for family, names, search in itertools.product(FAMILIES, stacks.orders(), searches)
    ]


MATRIX = _matrix(*stacks.SEARCHES)
WITHOUT_SAMPLING = _matrix("greedy", "beam")


@pytest.mark.parametrize("matrix", [MATRIX, WITHOUT_SAMPLING], ids=["all", "without sampling"])
def test_matrix_quick_part_holds_every_decoder_and_every_pair(matrix):
    """Each decoder alone, under every search and on both families; each pair in some stack."""
    quick, searches = [p.values for p in matrix if not p.marks], {p.values[2] for p in matrix}
    alone = {names for _, names, _ in quick if len(names) == 1}
    beside = {(name, search) for _, names, search in quick for name in names}
    families = {(name, family) for family, names, _ in quick for name in names}
    pairs = {frozenset(pair) for _, names, _ in quick for pair in itertools.combinations(names, 2)}
    assert alone == {(name,) for name in stacks.METHODS}
    assert families == set(itertools.product(stacks.METHODS, FAMILIES))
    assert beside == set(itertools.product(stacks.METHODS, searches))
    assert pairs == {frozenset(pair) for pair in itertools.combinations(stacks.METHODS, 2)}


@pytest.mark.parametrize("family, names, search", MATRIX)
def test_batch_equals_one_by_one(family, names, search):
    batch, seeds = tiny.inputs(family, 3, seed=1), [3, 4, 5]
    out, record = stacks.run(
        family, names, batch, search, seeds=seeds, eos_token_id=None if search == "sampling" else stacks.EOS
    )
    start = batch["input_ids"].shape[1]
    for i in range(3):
        alone, single = stacks.run(
            family,
            names,
            tiny.one(batch, i),
            search,
            seeds=seeds[i : i + 1],
            eos_token_id=None if search == "sampling" else stacks.EOS,
        )
        tokens = alone.sequences[
            0, -(alone.sequences.shape[1] - start + int((batch["attention_mask"][i] == 0).sum())) :
        ].tolist()
        mine = out.sequences[i, start:].tolist()
        length = len(tokens)
        assert mine[:length] == tokens
        if search == "beam":
            assert float(out.sequences_scores[i]) == pytest.approx(float(alone.sequences_scores[0]), abs=2e-3)
        else:
            steps = (
                length
                if not set(tokens) & set(stacks.EOS)
                else min(j for j, t in enumerate(tokens) if t in stacks.EOS) + 1
            )
            torch.testing.assert_close(
                torch.stack(out.logits)[:steps, i], torch.stack(alone.logits)[:steps, 0], atol=5e-3, rtol=1e-3
            )
        if "opera" in names:
            assert record["restless"][i] == single["restless"][0]
        if "prunehal" in names:
            assert [p["step"] for p in record["prunehal"][i]["prunes"]] == [
                p["step"] for p in single["prunehal"][0]["prunes"]
            ]
    if search == "sampling" and names:
        greedy, _ = stacks.run(family, names, batch, "greedy", seeds=seeds, eos_token_id=None)
        assert torch.equal(greedy.sequences, out.sequences)


def _never_drop(monkeypatch):
    """From here on, slots that nobody sees are only masked: the pool grows and drops none."""

    def grow(self, room, seen=None):
        self.resize(in_buckets(self.used + room))

    monkeypatch.setattr(SlotTable, "make_room", grow)


def _drop_at_every_step(monkeypatch):
    """From here on, the pool drops what nobody sees before every step."""
    real = ModelRunner.make_room

    def make_room(self, output, candidates, saved=None):
        for table in self.tables:
            table.wasteful = True
        return real(self, output, candidates, saved)

    monkeypatch.setattr(ModelRunner, "make_room", make_room)
    monkeypatch.setattr(SlotTable, "_pays", lambda self, unseen: unseen > 0)


@pytest.mark.parametrize("family, names, search", [p for p in WITHOUT_SAMPLING if "prunehal" in p.values[1]])
def test_pruned_equals_masked(family, names, search, monkeypatch):
    inputs = tiny.inputs(family, 2, seed=2)
    runs = [stacks.run(family, names, inputs, search, eos_token_id=None)]
    for policy in (_never_drop, _drop_at_every_step):
        with monkeypatch.context() as patch:
            policy(patch)
            runs.append(stacks.run(family, names, inputs, search, eos_token_id=None))
    (out, record), *others = runs
    for other, told in others:
        assert torch.equal(out.sequences, other.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(other.logits), atol=5e-3, rtol=1e-3)
        for one, two in zip(record["prunehal"], told["prunehal"], strict=True):
            assert one["prunes"] == two["prunes"] != []
    slots = hf.cache_of(out).layers[0].keys.shape
    assert all(hf.cache_of(other).layers[0].keys.shape == slots for other, _ in others)


@pytest.mark.parametrize("family, names, search", [p for p in WITHOUT_SAMPLING if "opera" not in p.values[1]])
def test_going_back_and_choosing_the_same_again_changes_nothing(family, names, search):
    inputs = tiny.inputs(family, 2, seed=3)
    plain, before = stacks.run(family, names, inputs, search, eos_token_id=None)
    for at, to in ((9, 2), (5, 4), (6, 6)) if len(names) < 2 else ((9, 2),):
        again, after = stacks.run(family, names, inputs, search, extra=(stacks.Rewind(at, to),), eos_token_id=None)
        assert after["rewind"] == [1] * 2
        if not torch.equal(again.sequences, plain.sequences):  # only where two beams are as good as equal
            two, _ = stacks.run(family, names, inputs, search, eos_token_id=None, num_return_sequences=2)
            best, second, scores = two.sequences[::2], two.sequences[1::2], two.sequences_scores.view(-1, 2)
            tied = (scores[:, 0] - scores[:, 1] < 1e-5)[:, None]
            assert torch.equal(
                torch.where(tied & (again.sequences == second).all(1, True), best, again.sequences), best
            )
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(plain.logits), atol=5e-3, rtol=1e-3)
        if "prunehal" in names:
            for one, two in zip(before["prunehal"], after["prunehal"], strict=False):
                # with lookahead, candidates for the token after the last were run, too
                assert one["prunes"] == [p for p in two["prunes"] if p["step"] <= 14]
                torch.testing.assert_close(one["attention"][:12], two["attention"][:12], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family, names, search", [p for p in WITHOUT_SAMPLING if len(p.values[1]) > 2])
def test_the_order_of_images_does_not_matter(family, names, search):
    batch, seeds = tiny.inputs(family, 3, seed=4, ragged=False), [3, 4, 5]
    out, _ = stacks.run(family, names, batch, search, seeds=seeds)
    n, turn = 3, [2, 0, 1]
    turned = {k: v.view(n, -1, *v.shape[1:])[turn].flatten(0, 1) if len(v) % n == 0 else v for k, v in batch.items()}
    other, _ = stacks.run(family, names, turned, search, seeds=[seeds[i] for i in turn])
    width = min(out.sequences.shape[1], other.sequences.shape[1])
    assert torch.equal(other.sequences[:, :width], out.sequences[turn][:, :width])


@functools.cache
def _plain_scores(family, search):
    return stacks.run(family, (), tiny.inputs(family, 2, seed=1), search, eos_token_id=None, new=8)[0].scores


@pytest.mark.parametrize("name", stacks.METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_decoder_acts_on_every_family_or_is_refused(family, name):
    """Prompts of unequal length, whose answers the decoder changes, say together what each says alone: here the first,
    which is padded, or the second, by turns.
    """
    method, batch = stacks.METHODS[name], tiny.inputs(family, 2, seed=1)
    turn = list(tiny.FAMILIES).index(family) + list(stacks.METHODS).index(name)
    search, i = ("greedy", "beam")[turn % 2], turn // 2 % 2
    options = dict(eos_token_id=None, new=8)
    if family in method.refused:
        with pytest.raises(StackError, match=method.refused[family]):
            stacks.run(family, (name,), batch, search, **options)
        return
    out, _ = stacks.run(family, (name,), batch, search, seeds=[3, 4], **options)
    assert not all(map(torch.equal, out.scores, _plain_scores(family, search)))
    alone, _ = stacks.run(family, (name,), tiny.one(batch, i), search, seeds=[3 + i], **options)
    assert torch.equal(alone.sequences[0, -8:], out.sequences[i, -8:])
    if search == "greedy":
        torch.testing.assert_close(torch.stack(alone.logits)[:, 0], torch.stack(out.logits)[:, i], atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "family, search, reverse",
    [  # quick: either order, by turns
        pytest.param(family, search, reverse, marks=[] if (i + k) % 2 == reverse else [pytest.mark.slow])
        for i, family in enumerate(tiny.FAMILIES)
        for k, search in enumerate(stacks.SEARCHES)
        for reverse in (False, True)
    ],
)
def test_neutral_settings_together_change_nothing(family, search, reverse):
    inputs = tiny.inputs(family, 2)
    options = (
        dict(
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=stacks.EOS[:1],
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        | stacks.SEARCHES[search]
    )
    neutral = [method.neutral() for method in stacks.METHODS.values() if method.neutral]
    plain = Stack([]).generate(tiny.model(family), **inputs, **options)
    out = Stack(neutral[::-1] if reverse else neutral).generate(tiny.model(family), **inputs, **options)
    assert torch.equal(out.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("prunes", ["copied", "own"])
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_branches_prune_as_told(search, prunes):
    inputs = tiny.inputs("llava", 2)
    stack = Stack([VCD(prunes=prunes), PruneHal(r=0.6, t=3)])
    options = (
        dict(max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
        | stacks.SEARCHES[search]
    )
    out = stack.generate(tiny.model("llava"), **inputs, **options)
    assert len(hf.cache_of(out).layers[0].keys) == len(out.sequences) == 2  # of main rows, those returned
    assert all(r["prunes"] for r in stack.record["prunehal"])


@pytest.mark.parametrize("search", list(stacks.SEARCHES))
def test_shared_beams_prune_alike(search):
    inputs = tiny.inputs("llava", 2)
    options = (
        dict(
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            num_return_sequences=3 if search == "beam" else 1,
        )
        | stacks.SEARCHES[search]
    )
    for beams in ("shared", "per_row"):
        stack = Stack([PruneHal(r=0.6, t=2, beams=beams)])
        out = stack.generate(tiny.model("llava"), **inputs, **options)
        kept = [[p["kept"] for p in r["prunes"]] for r in stack.record["prunehal"]]
        assert all(kept)
        if beams == "shared" and search == "beam":
            assert kept[0] == kept[1] == kept[2] and kept[3] == kept[4] == kept[5]
    assert out.sequences.shape[0] == len(kept)


def test_sampling_repeats_and_varies():
    inputs = tiny.inputs("llava", 2)
    for names, beams in ((("prunehal", "opera", "vcd"), 2), (("dola", "deco", "opera"), 1)):
        options, runs = dict(do_sample=True, temperature=1.6, num_beams=beams, eos_token_id=None), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(stacks.run("llava", names, inputs, "greedy", **options)[0].sequences)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


UNUSUAL = {
    "first_token+opera": lambda: [
        PruneHal(r=0.7, t=3, first_token=True),
        stacks.Restless(num_candidates=4, scale=30.0),
    ],
    "own_branch+opera": lambda: [
        VCD(prunes="own"),
        PruneHal(r=0.7, t=3),
        stacks.Restless(num_candidates=4, scale=30.0),
    ],
    "two_branches": lambda: [VCD(), VCD(distortion="blank", alpha=0.3), PruneHal(r=0.7, sets="shared")],
    "random+opera": lambda: [PruneHal(r=0.7, keep="random"), stacks.Restless(num_candidates=4, scale=30.0)],
}


MANY = [dict(), dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, top_k=1, num_return_sequences=2)]


@pytest.mark.parametrize(
    "family, name, options",
    [  # quick: each stack under each options, on one of the two families
        pytest.param(family, name, options, marks=[] if family == FAMILIES[(i + k) % 2] else [pytest.mark.slow])
        for family in tiny.FAMILIES
        for i, name in enumerate(UNUSUAL)
        for k, options in enumerate(MANY)
    ],
    ids=str,
)
def test_unusual_stacks_in_a_batch_equal_one_by_one(family, name, options):
    batch = tiny.inputs(family, 2, seed=1)
    options = dict(max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    decoders, acted = all_watched(UNUSUAL[name]())
    out = Stack(decoders).generate(tiny.model(family), **batch, **options)
    assert all(acted)
    start, many = batch["input_ids"].shape[1], options.get("num_return_sequences", 1)
    for i in range(2):
        single = tiny.one(batch, i)
        alone = Stack(UNUSUAL[name]()).generate(tiny.model(family), **single, **options)
        assert torch.equal(alone[:, single["input_ids"].shape[1] :], out[i * many : (i + 1) * many, start:])
