"""PruneHal (arXiv 2510.19183), reconstructed: no official code exists, and the paper was withdrawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decoders import Decoder, Reads, Run, StackError, Step
from decoders.errors import choices

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

    Let A_l(m) be the attention of the newest token to the visual tokens left in layer l at forward m (softmax over the whole
    cache, mean over heads, mean over those tokens). At the start of step m >= 2 layer l votes to prune when

        A_l(m-1) < sqrt(r) * mean(A_l(1) .. A_l(m-2)),

    and at m = 2 the prune is unconditional. When most layers vote, each layer keeps the share `r` of its visual tokens with
    the largest head-averaged attention, floor(r * count + 1e-6), at least 1; text stays; positions stay; dropped tokens do not come back.
    PruneHal: Reducing Hallucinations in Multi-modal Large Language Models through Adaptive KV Cache Pruning, https://arxiv.org/abs/2510.19183.
    This is a reconstruction from the abstract and the public reviews; what they leave open is an option.

    Args:
        r: share of visual tokens kept by a prune, in (0, 1]; LLaVA-1.5 0.4, InstructBLIP 0.7, Qwen-VL 0.9. 1 prunes nothing.
        t: most prunes in a generation, >= 0; LLaVA-1.5 3, InstructBLIP 2, Qwen-VL 4.
        reference: what the newest attention is compared with: the `running_mean` of all steps before, the `first_step`, or the
            running mean since the last prune (`reset_on_prune`).
        timing: prune `before` a forward, by the attention of the one before it, or `after` it, by its own.
        sets: each layer keeps its own set (`per_layer`), or all keep one, ranked by the mean over layers (`shared`).
        majority: `strict`, more than half of the layers, or `half`, at least half.
        forced: prune unconditionally at m = 2.
        forced_counts: whether that prune counts toward `t`.
        beams: each beam prunes for itself (`per_row`); `shared` is accepted only without beams, where the two are one.
        keep: which tokens survive, `top`; `random` and `lowest` are controls.
        top_k: the fixed variant: keep this many at the forced prune, and never prune again.
        first_token: prune after the prefill by the last prompt token's attention, and run that token again, so that the first
            token is affected too; takes the place of the prune at m = 2.
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
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, (int, float)) or not 0 < self.r <= 1:
            raise StackError(f"prunehal: r is the share of visual tokens kept, in (0, 1], not {self.r}; the nearest valid value is {min(1.0, max(0.01, _number(self.r)))}")
        if isinstance(self.t, bool) or not isinstance(self.t, int) or self.t < 0:
            raise StackError(f"prunehal: t is the most prunes in a generation, an integer >= 0, not {self.t}; the nearest valid value is {max(0, round(_number(self.t)))}")
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise StackError(f"prunehal: {choices(getattr(self, name), valid, name)}")
        if self.top_k is not None and (self.top_k < 1 or not (self.forced or self.first_token)):
            raise StackError(f"prunehal: top_k is a count of visual tokens, >= 1, kept at the forced prune (forced=true), not {self.top_k} with forced={self.forced}")

    def reads(self, model: Any) -> Reads:
        return Reads(attention=None, visual=True)

    def start(self, run: Run) -> _State:
        n, l = run.rows, run.layers
        zeros = torch.zeros(n, l, device=run.device)
        noise = [torch.Generator().manual_seed(1_000_003 * self.seed + seed) for seed in run.seeds]
        return _State(torch.zeros(n, dtype=torch.long, device=run.device), zeros, zeros[:, 0].clone(), zeros.clone(), noise)

    def before_first_token(self, step: Step, state: _State) -> Tensor | None:
        if not self.first_token:
            return None
        state.first_done = True
        return self._forced(step, state, _mean_attention(step))

    def observe(self, step: Step, state: _State) -> Tensor | None:
        level = _mean_attention(step)  # [n, l]
        state.curve.append(level)
        forced_at = 1 if self.timing == "before" else 2
        kept = None
        if step.number == forced_at and self.forced and not state.first_done:
            kept = self._forced(step, state, level)
        elif step.number >= forced_at and self.top_k is None:
            kept = self._voted(step, state, level)
        self._remember(step, state, level, kept)
        return kept

    def record(self, state: _State) -> list[dict]:
        """Per row: `prunes`, each with its `step` m, the layers' `votes` and the places in the prompt that each layer `kept`; `attention`, float [steps, l]."""
        curve = torch.stack(state.curve, 1).cpu() if state.curve else torch.zeros(len(state.used), 0, 0)
        rows = [{"prunes": [], "attention": c} for c in curve]
        for event in state.prunes:
            pruned, votes, kept = event["rows"].tolist(), event["votes"].cpu(), event["origin"].cpu()
            for row, (hit, vote) in enumerate(zip(pruned, votes)):
                if hit:
                    rows[row]["prunes"].append({"step": event["step"], "votes": vote.tolist(), "kept": [sorted(k[k >= 0].tolist()) for k in kept[:, row]]})
        return rows

    def _forced(self, step: Step, state: _State, level: Tensor) -> Tensor | None:
        allowed = step.alive & (state.used < self.t if self.forced_counts else torch.ones_like(step.alive))
        return self._prune(step, state, allowed, torch.ones_like(level, dtype=torch.bool), self.forced_counts)

    def _voted(self, step: Step, state: _State, level: Tensor) -> Tensor | None:
        """Layers whose attention sank below sqrt(r) of their reference vote; rows with a majority prune."""
        reference = state.first if self.reference == "first_step" else state.total / state.count.clamp(min=1)[:, None]
        votes = (level < math.sqrt(self.r) * reference) & (state.count > 0)[:, None]
        ballots, layers = votes.sum(-1), level.shape[1]
        majority = 2 * ballots > layers if self.majority == "strict" else 2 * ballots >= layers
        return self._prune(step, state, majority & step.alive & (state.used < self.t), votes, True)

    def _prune(self, step: Step, state: _State, rows: Tensor, votes: Tensor, counts: bool) -> Tensor | None:
        """bool [l or 1, n, t]: the slots that stay where `rows`, bool [n], prune; None where nothing is dropped."""
        present = step.visual.sum(-1)[0]  # [n], as many in every layer
        target = torch.full_like(present, self.top_k) if self.top_k is not None else torch.floor(self.r * present + 1e-6).long()
        target = target.clamp(min=1)
        rows = rows & (target < present)
        if not rows.any():
            return None
        state.used += rows.long() if counts else 0
        width = step.visual.shape[-1]
        attention = step.attention[..., :width]
        rank = self._rank(attention, step.visual, state, rows)
        order = rank.masked_fill(~step.visual, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(width, device=order.device).expand_as(order).contiguous())
        stays = ~step.visual | (place < target[:, None]) | ~rows[:, None]  # [l, n, t']
        visual = step.visual & stays
        at = step.number + 1 if state.curve and self.timing == "before" else step.number
        state.prunes.append({"step": at, "rows": rows, "votes": votes, "origin": step.origin.expand_as(visual).masked_fill(~visual, -1).expand(votes.shape[1], -1, -1)})
        newer = stays.new_ones(*stays.shape[:-1], step.attention.shape[-1] - width)
        return torch.cat([stays, newer], -1)

    def _rank(self, attention: Tensor, visual: Tensor, state: _State, rows: Tensor) -> Tensor:
        """What is kept first, float [l or 1, n, t']."""
        if self.sets == "shared":
            attention = attention.mean(0, keepdim=True)
        if self.keep == "top":
            return attention
        if self.keep == "lowest":
            return -attention
        layers, rank = len(attention), torch.zeros_like(attention)
        for row in rows.nonzero().flatten().tolist():  # each image draws for itself, whatever the batch
            places = visual[:, row].expand(layers, -1)
            count = int(places[0].sum())
            rank[:, row][places] = torch.rand(layers, count, generator=state.noise[row]).flatten().to(rank)
        return rank

    def _remember(self, step: Step, state: _State, level: Tensor, kept: Tensor | None) -> None:
        """Let the newest attention join the history."""
        if step.number == 1:
            state.first = level
        state.total, state.count = state.total + level, state.count + 1
        if self.reference == "reset_on_prune" and kept is not None:
            pruned = state.prunes[-1]["rows"]
            state.total = state.total.masked_fill(pruned[:, None], 0.0)
            state.count = state.count.masked_fill(pruned, 0.0)


@dataclass
class _State:
    """used: prunes counted, [n]; total, count: sum and number of past attentions, [n, l] and [n]; first: A(1), [n, l]."""

    used: Tensor
    total: Tensor
    count: Tensor
    first: Tensor
    noise: list[torch.Generator]
    first_done: bool = False
    curve: list[Tensor] = field(default_factory=list)
    prunes: list[dict] = field(default_factory=list)


def _mean_attention(step: Step) -> Tensor:
    """A_l(m): mean attention to the visual tokens left, float [n, l]."""
    attention = step.attention[..., : step.visual.shape[-1]]
    return ((attention * step.visual).sum(-1) / step.visual.sum(-1)).T


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.4
