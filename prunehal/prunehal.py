"""PruneHal (arXiv 2510.19183), reconstructed: no official code exists, and the paper was withdrawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from decoders import CacheView, Decoder, GenerationContext, Requirements, StackError, Step, write_at
from decoders.options import check_choice, check_flag, check_integer, check_number

_CHOICES = {
    "reference": ("running_mean", "first_step", "reset_on_prune"),
    "timing": ("before", "after"),
    "sets": ("per_layer", "shared"),
    "majority": ("strict", "half"),
    "beams": ("per_row", "shared"),
    "keep": ("top", "random", "lowest"),
}


@dataclass
class PruneHal(Decoder):
    """Cut the least-attended visual tokens from the KV cache when attention to the visual tokens sinks.

    Let A_l(m) be the attention of the newest token to the visual tokens left in layer l at forward m (softmax over the
    whole cache, mean over heads, mean over those tokens). At the start of step m >= 2 layer l votes to prune when

        A_l(m-1) < sqrt(r) * mean(A_l(1) .. A_l(m-2)),

    and at m = 2 the prune is unconditional. When most layers vote, each layer keeps the share `r` of its visual tokens
    with the largest head-averaged attention, floor(r * count + 1e-6), at least 1; text stays; positions stay; dropped
    tokens do not come back.
    PruneHal: Reducing Hallucinations in Multi-modal Large Language Models through Adaptive KV Cache Pruning,
    https://arxiv.org/abs/2510.19183. This is a reconstruction from the abstract and the public reviews; what they leave
    open is an option.

    Args:
        r: share of visual tokens kept by a prune, in (0, 1]; LLaVA-1.5 0.4, InstructBLIP 0.7, Qwen-VL 0.9. 1 prunes
            nothing.
        t: most prunes in a generation, >= 0; LLaVA-1.5 3, InstructBLIP 2, Qwen-VL 4.
        reference: what the newest attention is compared with: the `running_mean` of all steps before, the `first_step`,
            or the running mean since the last prune (`reset_on_prune`).
        timing: prune `before` a forward, by the attention of the one before it, or `after` it, by its own.
        sets: each layer keeps its own set (`per_layer`), or all keep one, ranked by the mean over layers (`shared`).
        majority: `strict`, more than half of the layers, or `half`, at least half.
        forced: prune unconditionally at m = 2.
        forced_counts: whether that prune counts toward `t`.
        beams: each beam votes and prunes for itself (`per_row`), or all beams of an image together (`shared`), by their
            mean attention.
        keep: which tokens survive, `top`; `random` and `lowest` are controls.
        top_k: the fixed variant: keep this many at the forced prune, and never prune again.
        first_token: prune after the prefill by the last prompt token's attention, and run that token again, so that the
            first token is affected too; takes the place of the prune at m = 2.
        boost: a control: drop nothing, and multiply the attention weights of the tokens that a prune would keep by this
            factor instead, > 0, once for every prune that keeps them; as if the others had been dropped, later prunes
            choose among those kept.
        seed: of `random`, together with each image's seed.

    Raises:
        StackError: for a value out of range.
    """

    r: float = 0.4
    t: int = 3
    reference: str = "running_mean"
    timing: str = "before"
    sets: str = "per_layer"
    majority: str = "strict"
    forced: bool = True
    forced_counts: bool = True
    beams: str = "per_row"
    keep: str = "top"
    top_k: int | None = None
    first_token: bool = False
    boost: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_number(self, "r", 0, 1, above=True, meaning="the share of visual tokens kept")
        check_integer(self, "t", 0, meaning="the most prunes in a generation")
        for name, valid in _CHOICES.items():
            check_choice(self, name, valid)
        for name in ("forced", "forced_counts", "first_token"):
            check_flag(self, name)
        for name in ("seed", "top_k"):
            check_integer(self, name, optional=True)
        check_number(self, "boost", 0, above=True, optional=True, meaning="a factor")
        if self.boost is not None and self.first_token:
            raise StackError(
                "prunehal: boost does not go with first_token, which runs the last prompt token again only where"
                " something was dropped; leave one out"
            )
        if self.top_k is not None and (self.top_k < 1 or not (self.forced or self.first_token)):
            raise StackError(
                "prunehal: top_k is a count of visual tokens, >= 1, kept at the forced prune (forced=true), not"
                f" {self.top_k} with forced={self.forced}"
            )

    def requirements(self, model: Any) -> Requirements:
        return Requirements(attention=None, visual=True, reruns_last_token=self.first_token)

    def init_state(self, context: GenerationContext) -> _State:
        n, layers, events = context.rows, context.layers, self.t + 1
        zeros = torch.zeros(n, layers, device=context.device)
        return _State(
            used=torch.zeros(n, dtype=torch.long, device=context.device),
            total=zeros,
            count=torch.zeros(n, device=context.device),
            first=zeros,
            forced=torch.zeros(n, dtype=torch.bool, device=context.device),
            due=torch.zeros(n, dtype=torch.bool, device=context.device),
            spends=torch.zeros(n, dtype=torch.bool, device=context.device),
            seeds=torch.tensor(context.seeds, device=context.device),
            start=context.visual.long().argmax(-1),
            offset=torch.full((n,), context.offset, device=context.device),
            ran=torch.zeros(n, dtype=torch.long, device=context.device),
            curve=torch.zeros(n, 0, layers, device=context.device),
            votes=torch.zeros(n, 0, layers, dtype=torch.bool, device=context.device),
            events=torch.zeros(n, dtype=torch.long, device=context.device),
            steps=torch.zeros(n, events, dtype=torch.long, device=context.device),
            kept=torch.zeros(n, events, layers, context.prompt, dtype=torch.bool, device=context.device),
        )

    def select_slots_after_prefill(self, step: Step, state: _State) -> Tensor | None:
        if not self.first_token:
            return None
        level = _mean_attention(step)
        everyone = torch.ones_like(state.forced)
        kept = self._prune(
            step,
            state,
            everyone & ((state.used < self.t) | (not self.forced_counts)) & self._droppable(step),
            torch.full_like(everyone, self.forced_counts),
            step.num_forwards,
        )
        state.forced = everyone
        state.votes = write_at(
            state.votes, step.num_forwards - 1, torch.ones_like(level, dtype=torch.bool), step.max_num_forwards
        )
        return kept

    def wants_to_prune(self, step: Step, state: _State) -> Tensor:
        step = self._left(step, state)
        level = _mean_attention(step)  # [n, l]
        if self.beams == "shared":
            level = rearrange(
                reduce(level, "(b k) l -> b l", "mean", k=step.beams)[:, None].expand(-1, step.beams, -1),
                "b k l -> (b k) l",
            )
        state.curve = write_at(state.curve, step.num_forwards - 1, level, step.max_num_forwards)
        before = self.timing == "before"
        forced = step.num_forwards == (1 if before else 2) if self.forced else torch.zeros_like(state.forced)
        if self.first_token:  # then it may be done already
            forced = forced & ~state.forced
        votes, left = self._votes(state, level), state.used < self.t
        if not before:
            votes = votes & (step.num_forwards >= 2)[:, None] & ~forced[:, None]
        voted = self._majority(votes) & left if self.top_k is None else torch.zeros_like(forced)
        index = step.num_forwards if before else step.num_forwards - 1
        state.votes = write_at(state.votes, index, votes | forced[:, None], step.max_num_forwards + 1)
        state.spends = left if self.forced_counts else voted
        allowed = forced & left if self.forced_counts else forced
        state.due = (allowed | voted) & step.unfinished & self._droppable(step)
        self._remember(step, state, level)
        return state.due

    def select_slots(self, step: Step, state: _State) -> Tensor | None:
        step = self._left(step, state)
        kept = self._prune(step, state, state.due, state.spends, step.num_forwards + (self.timing == "before"))
        return kept if self.boost is None else None

    def attention_bias(self, cache: CacheView, state: _State) -> Tensor | None:
        return None if self.boost is None else math.log(self.boost) * self._at(state.kept.sum(1), cache.slot_positions)

    def _left(self, step: Step, state: _State) -> Step:
        """The step with the visual tokens that are left; with `boost`, nothing is dropped, and those left are those
        that the last prune kept.
        """
        if self.boost is None:
            return step
        left = self._at(state.kept.sum(1), step.slot_positions) == state.events[:, None]
        return step.replace(visual=step.visual & left)

    def _at(self, tokens: Tensor, origin: Tensor) -> Tensor:
        """Values by layer and prompt token, [n, l, prompt], by slot, [l, n, t']; 0 for other slots."""
        prompt = tokens.shape[-1]
        values = rearrange(tokens, "n l p -> l n p")
        there = (origin >= 0) & (origin < prompt)
        return values.gather(2, origin.clamp(0, prompt - 1).expand(len(values), -1, -1)) * there

    def record(self, state: _State) -> list[dict]:
        """Per row: `prunes`, each with its `step` m, the layers' `votes` and the places in the prompt that each layer
        `kept`; `attention`
        (float) and `votes` (bool), [steps, l], of every step that the row ran."""
        rows = []
        counts, events = state.ran.tolist(), state.events.tolist()
        state = _State(**{name: value.cpu() for name, value in vars(state).items()})
        for row, (ran, happened) in enumerate(zip(counts, events, strict=True)):
            prunes = [
                {
                    "step": (m := int(state.steps[row, e])),
                    "votes": state.votes[row, m - 1].tolist(),
                    "kept": [(kept.nonzero() - state.offset[row]).flatten().tolist() for kept in state.kept[row, e]],
                }
                for e in range(happened)
            ]
            rows.append({"prunes": prunes, "attention": state.curve[row, :ran], "votes": state.votes[row, :ran]})
        return rows

    def _votes(self, state: _State, level: Tensor) -> Tensor:
        """bool [n, l]: layers whose attention sank below sqrt(r) of their reference; none while there is no history."""
        if self.reference == "first_step":
            return (level < math.sqrt(self.r) * state.first) & (state.count > 0)[:, None]
        # of the mean, total / count
        return level * state.count[:, None] < math.sqrt(self.r) * state.total

    def _majority(self, votes: Tensor) -> Tensor:
        """bool [n]: more than half of the layers vote for a prune, or half of them are enough."""
        layers = votes.shape[1]
        return votes.sum(-1) > (layers // 2 if self.majority == "strict" else (layers + 1) // 2 - 1)

    def _target(self, present: Tensor) -> Tensor:
        """long [l or 1, n]: visual tokens that a prune leaves of those present, of that shape."""
        if self.top_k is not None:
            return torch.full_like(present, self.top_k)
        return torch.floor(self.r * present + 1e-6).long().clamp(min=1)

    def _droppable(self, step: Step) -> Tensor:
        """bool [n]: rows in which a prune would drop something, in which `_target` is less than what is present."""
        most = _num_visual(step).amax(0)
        if self.top_k is not None:
            return most > self.top_k
        return most > (max(1.0, 1e-6 / (1 - self.r)) if self.r < 1 else math.inf)

    def _prune(self, step: Step, state: _State, rows: Tensor, spends: Tensor, at: Tensor) -> Tensor:
        """bool [l or 1, n, t]: the slots that stay where `rows`, bool [n], prune."""
        target = self._target(_num_visual(step))
        rank = self._rank(step, state)
        order = rank.masked_fill(~step.visual, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous()
        )
        stays = ~step.visual | (place < target[..., None]) | ~rows[:, None]  # [l, n, t]
        self._note(step, state, rows, step.visual & stays, spends, at)
        return stays

    def _note(self, step: Step, state: _State, rows: Tensor, kept: Tensor, spends: Tensor, at: Tensor) -> None:
        """Write a prune into the record: which prompt tokens each layer kept."""
        prompt = state.kept.shape[-1]
        where = step.slot_positions.expand(len(kept), -1, -1).masked_fill(~kept, prompt)
        tokens = torch.zeros(*kept.shape[:2], prompt + 1, dtype=torch.bool, device=kept.device).scatter_(
            2, where, True
        )[..., :prompt]
        tokens = rearrange(tokens.expand(state.kept.shape[2], -1, -1), "l n p -> n l p")
        spent = state.events.clamp(max=state.kept.shape[1] - 1)
        yes = rows[:, None]
        state.steps = torch.where(yes, write_at(state.steps, spent, at, 0), state.steps)
        state.kept = torch.where(yes[..., None, None], write_at(state.kept, spent, tokens, 0), state.kept)
        state.events = state.events + rows.long()
        state.used = state.used + (rows & spends)

    def _rank(self, step: Step, state: _State) -> Tensor:
        """What is kept first, float [l or 1, n, t]."""
        attention = step.attention
        if self.sets == "shared":
            attention = attention.mean(0, keepdim=True)
        if self.beams == "shared":
            attention = reduce(attention, "l (b k) t -> l b 1 t", "mean", k=step.beams).expand(-1, -1, step.beams, -1)
            attention = rearrange(attention, "l b k t -> l (b k) t")
        if self.keep == "top":
            return attention
        if self.keep == "lowest":
            return -attention
        # each image draws for itself, by places counted from its first visual token: the same whatever the batch, its
        # padding, beams and returns
        prompt, layers = state.kept.shape[-1], len(attention)
        draws = []
        for seed, number in zip(state.seeds.tolist(), step.num_forwards.tolist(), strict=True):
            generator = torch.Generator().manual_seed((1_000_003 * (1_000_003 * self.seed + seed) + number) % 2**63)
            draws.append(torch.rand(prompt, layers, generator=generator))
        origin = step.slot_positions.expand(layers, -1, -1)
        noise = rearrange(torch.stack(draws), "n p l -> l n p").to(attention)
        return noise.gather(2, (origin - state.start[:, None]).clamp(0, prompt - 1))

    def _remember(self, step: Step, state: _State, level: Tensor) -> None:
        """Let the newest attention join the history, or begin a new one in rows that prune."""
        if self.reference == "first_step":
            state.first = torch.where((step.num_forwards == 1)[:, None], level, state.first)
        state.total, state.count = state.total + level, state.count + 1
        state.ran = torch.where(step.unfinished, step.num_forwards, state.ran)
        if self.reference == "reset_on_prune":
            state.total = state.total.masked_fill(state.due[:, None], 0.0)
            state.count = state.count.masked_fill(state.due, 0.0)


@dataclass
class _State:
    """Of a generation; n rows, l layers, m forwards.

    Attributes:
        used: prunes counted, long [n].
        total, count: sum and number of past attentions, [n, l] and [n].
        first: A(1), [n, l].
        forced: whether the unconditional prune is done or waived, bool [n].
        due: whether the newest forward asks for a prune, bool [n]; spends: whether that counts, bool [n].
        seeds, start: the image's seed and the position of the first visual token, long [n].
        offset: positions before the prompt's first token, long [n].
        ran: forwards seen unfinished, long [n].
        curve, votes: for the record, [n, m, l].
        events: prunes made, long [n]; steps: when, long [n, events]; kept: bool [n, events, l, prompt].
    """

    used: Tensor
    total: Tensor
    count: Tensor
    first: Tensor
    forced: Tensor
    due: Tensor
    spends: Tensor
    seeds: Tensor
    start: Tensor
    offset: Tensor
    ran: Tensor
    curve: Tensor
    votes: Tensor
    events: Tensor
    steps: Tensor
    kept: Tensor


def _mean_attention(step: Step) -> Tensor:
    """A_l(m): mean attention to the visual tokens left, float [n, l]; 0 in rows that hold none."""
    return ((step.attention * step.visual).sum(-1) / step.visual.sum(-1).clamp(min=1)).T


def _num_visual(step: Step) -> Tensor:
    """long [l or 1, n]: visual tokens left."""
    return step.visual.sum(-1)
