"""Stacks for tests of composition, of decoders set so that they act on the tiny models, and that prunes and returns
really happen. A decoder is in all of these tests once it has its line in METHODS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tiny
import torch
from acting import all_watched

from baselines import ICD, M3ID, ONLY, OPERA, PAI, SID, VCD, VISTA, VTI, AvisC, DeCo, DoLa, FastV, MemVR
from baselines.vti_directions import Directions
from decoders import Decoder, Requirements, Stack, hf, persistent
from decoders.tensors import pad_or_crop
from prunehal import PruneHal

EOS = [40, 55, 70, 85, 100]  # so many that some rows end early


class Restless(OPERA):
    """OPERA that goes back at set times, which differ between images, in place of when votes say so."""

    def init_state(self, context):
        self.shift = context.input_ids.sum(-1) % 3  # padding is 0
        return super().init_state(context)

    def _return(self, step, state, vote):
        place = step.num_forwards - 1
        state.tried = pad_or_crop(state.tried, [len(vote), max(step.max_num_forwards + 1, 16)])
        state.asked = torch.stack([place, vote * 0 + 3], 1)
        shift = self.shift.repeat_interleave(len(vote) // len(self.shift))
        first = (place == 6 + shift) & (state.tried[:, 3] == 0)
        second = (place == 9 + shift) & (state.tried[:, 4] == 0)
        return torch.where(step.unfinished & first, 3, torch.where(step.unfinished & second, 4, -1))


@dataclass(frozen=True)
class Method:
    """A decoder as these tests use it.

    Attributes:
        make: from the name of a tiny family to the decoder, set so that it acts on that model.
        acts: the hooks that must be seen to change something in every run.
        neutral: settings that change nothing; None where there are none.
        refused: of families that it cannot act on, what the message says.
    """

    make: Callable[[str], Decoder]
    acts: set[str]
    neutral: Callable[[], Decoder] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def directions(family: str) -> Directions:
    """VTI's, at random, for a tiny model."""
    generator, model = torch.Generator().manual_seed(5), tiny.model(family)
    inner = hf.inner_language_model(model)
    text = torch.randn(hf.num_layers(inner), hf.width(inner), generator=generator)
    return Directions(text, torch.randn(2, PLACES[family], 32, generator=generator) if family in PLACES else None)


PLACES = {"llava": 17, "internvl": 65, "llava_next": 17, "llava_onevision": 16, "instructblip": 17}  # of a picture
INSERTED = (20, 21, 22, 23)
TEXT_ALONE = {"instructblip": "a prompt without its picture cannot run: InstructBlip"}
SCORES = {"process_logits"}
METHODS = {
    "prunehal": Method(lambda _: PruneHal(r=0.7, t=4), {"select_slots"}, lambda: PruneHal(r=1)),
    "opera": Method(
        lambda _: Restless(num_candidates=4, scale=30.0, penalty=0.7),
        {"rescore_candidates", "rollback"},
        lambda: OPERA(penalty=0, threshold=None, num_candidates=8),
    ),
    "vcd": Method(lambda _: VCD(alpha=0.6, beta=0.02), SCORES, lambda: VCD(alpha=0, beta=0)),
    "dola": Method(lambda _: DoLa([0, 1], relative_top=0.02), SCORES),
    "deco": Method(lambda _: DeCo(top_p=0.98, layers=[1, 2]), SCORES, lambda: DeCo(alpha=0, top_p=1, top_k=tiny.VOCAB)),
    "pai": Method(
        lambda _: PAI(alpha=0.6, gamma=1.4, beta=0.05, start_layer=1),
        {"edit_attention", "process_logits"},
        lambda: PAI(alpha=0, gamma=1),
        TEXT_ALONE,
    ),
    "m3id": Method(lambda _: M3ID(lam=0.3, beta=0.05), SCORES, lambda: M3ID(lam=0, beta=0), TEXT_ALONE),
    "icd": Method(lambda _: ICD(alpha=1.5, beta=0.02, insert_ids=INSERTED), SCORES, lambda: ICD(alpha=0, beta=0)),
    "sid": Method(lambda _: SID(alpha=1.0, beta=0.02, layer=1, keep=2), SCORES, lambda: SID(alpha=0, beta=0)),
    "avisc": Method(lambda _: AvisC(alpha=1.5, beta=0.02), SCORES, lambda: AvisC(alpha=0, beta=0)),
    "fastv": Method(lambda _: FastV(layer=1, ratio=0.7), {"edit_attention"}, lambda: FastV(ratio=0)),
    "vista": Method(
        lambda _: VISTA(lam=0.3, alpha=0.4, layers=[0, 1]),
        {"edit_mlp", "process_logits"},
        lambda: VISTA(lam=0, alpha=0),
        TEXT_ALONE,
    ),
    "vti": Method(
        lambda family: VTI(directions(family), alpha_text=1.5, alpha_image=1.5 if family in PLACES else 0),
        {"edit_mlp"},
        lambda: VTI(alpha_text=0, alpha_image=0),
    ),
    "only": Method(
        lambda _: ONLY(alpha_pos=2.0, alpha_neg=1.5, beta=0.02, gamma=0.8, layer=1),
        SCORES,
        lambda: ONLY(alpha_pos=0, alpha_neg=0, beta=0),
    ),
    "memvr": Method(
        lambda _: MemVR(ratio=0.6, threshold=0.8, start=-1, end=2),
        {"edit_mlp"},
        lambda: MemVR(ratio=0),
    ),
}


def make(name: str, family: str = "llava") -> Decoder:
    return METHODS[name].make(family)


def pairs() -> list[tuple[str, ...]]:
    """All pairs, every other one turned round."""
    return [pair[:: -1 if i % 2 else 1] for i, pair in enumerate(itertools.combinations(METHODS, 2))]


def larger(size: int = 5) -> list[tuple[str, ...]]:
    """Stacks of `size` that hold every pair between them: each takes, one by one, the decoder with which it has most
    pairs that no stack before has.
    """
    missing, found = {frozenset(pair) for pair in pairs()}, []
    while missing:
        stack = list(min(sorted(map(sorted, missing))))
        while len(stack) < size:
            others = [name for name in METHODS if name not in stack]
            stack.append(max(others, key=lambda name: sum(frozenset((name, one)) in missing for one in stack)))
        missing -= {frozenset(pair) for pair in itertools.combinations(stack, 2)}
        found.append(tuple(stack[:: -1 if len(found) % 2 else 1]))
    return found


def quick() -> list[tuple[str, ...]]:
    """Nothing, each alone, and larger stacks that hold every pair."""
    return [(), *((name,) for name in METHODS), *larger()]


def orders() -> list[tuple[str, ...]]:
    """The quick ones, all pairs, everything, and the larger ones the other way round."""
    every = [*quick(), *pairs(), *(stack[::-1] for stack in larger()), tuple(METHODS)]
    return list(dict.fromkeys(every))


SEARCHES = {"greedy": {}, "sampling": dict(do_sample=True, top_k=1), "beam": dict(num_beams=3)}


def run(
    family: str,
    names: tuple[str, ...],
    inputs: dict,
    search: str,
    new: int = 14,
    extra: tuple[Decoder, ...] = (),
    seeds=None,
    **options,
):
    """(output with logits and scores, record) of a stack, each of whose decoders was seen to act."""
    decoders, acted = all_watched(make(name, family) for name in names)
    stack = Stack([*decoders, *extra])
    options = (
        dict(
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        | SEARCHES[search]
        | options
    )
    out = stack.generate(tiny.model(family), **inputs, **options, seeds=seeds)
    ended = out.sequences.shape[1] - inputs["input_ids"].shape[1] < 9  # before the first return is due
    for name, changed in zip(names, acted, strict=True):
        must = METHODS[name].acts - ({"rollback"} if ended else set())
        assert changed >= must, f"{name} changed {sorted(changed) or 'nothing'}, where {sorted(must)} must"
    return out, stack.record


@dataclass
class _Once:
    done: torch.Tensor = persistent()


class Rewind(Decoder):
    """Goes back once, from `at` tokens to `to`, and changes nothing else."""

    def __init__(self, at: int, to: int):
        self.at, self.to = at, to

    def requirements(self, model):
        return Requirements(lookahead=2, rollback=True)

    def init_state(self, context):
        return _Once(torch.zeros(context.rows, dtype=torch.long))

    def rescore_candidates(self, step, candidates, state, scores):
        return scores, torch.where((step.num_forwards - 1 == self.at) & (state.done == 0), self.to, -1)

    def on_rollback(self, state, rollback):
        state.done = state.done + rollback.rows.long()

    def record(self, state):
        return state.done.tolist()
