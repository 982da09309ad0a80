"""Stacks for tests of composition: every subset of the methods, in two orders, set so that prunes and returns really
happen.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import tiny
import torch
from acting import all_watched

from baselines import OPERA, VCD, DeCo, DoLa
from decoders import Decoder, Requirements, Stack, persistent
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


MAKE = {
    "prunehal": lambda: PruneHal(r=0.7, t=4),
    "opera": lambda: Restless(num_candidates=4, scale=30.0, penalty=0.7),
    "vcd": lambda: VCD(alpha=0.6, beta=0.02),
    "dola": lambda: DoLa([0, 1], relative_top=0.02),
    "deco": lambda: DeCo(top_p=0.98, layers=[1, 2]),
}


# what each of them must be seen to change in every run
ACTS = {
    "prunehal": {"select_slots"},
    "restless": {"rescore_candidates", "rollback"},
    "vcd": {"process_logits"},
    "dola": {"process_logits"},
    "deco": {"process_logits"},
}


def orders() -> list[tuple[str, ...]]:
    """Every subset, each of two and more in two orders."""
    subsets = [s for n in range(len(MAKE) + 1) for s in itertools.combinations(MAKE, n)]
    return [*subsets, *(s[::-1] for s in subsets if len(s) > 1)]


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
    decoders, acted = all_watched(MAKE[name]() for name in names)
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
    for decoder, changed in zip(decoders, acted, strict=True):
        name = decoder.name
        must = ACTS[name] - ({"rollback"} if ended else set())
        assert changed >= must, f"{name} changed {sorted(changed) or 'nothing'}, where {sorted(must)} must"
    return out, stack.record


@functools.cache
def acts_alone(family: str, search: str) -> bool:
    """Whether each decoder, alone, changes the scores of this model under this search, or else an assertion fails."""
    inputs = tiny.inputs(family, 2)
    plain, _ = run(family, (), inputs, search, eos_token_id=EOS[:1])
    for name in MAKE:
        out, _ = run(family, (name,), inputs, search, eos_token_id=EOS[:1])
        same = len(out.scores) == len(plain.scores) and all(map(torch.equal, out.scores, plain.scores))
        assert not same, f"{name} changes no score"
    return True


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
