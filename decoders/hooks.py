"""Calls the hooks of a stack's decoders, each with what it asked for, and joins their answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .beams import BeamSearch, Hypotheses
from .early import Key, early_keys
from .errors import StackError, in_hook
from .interface import Decoder, GenerationContext, Requirements
from .outputs import CandidateRun, ForwardOutput
from .runner import ModelRunner
from .search import SampleSearch
from .states import DecoderStates
from .views import CacheView, Candidates, Step

# hooks that are called only where a decoder has one
_ASKED = (
    *("model_context", "encoding_context", "attention_bias", "process_logits", "rescore_candidates"),
    *("select_slots", "select_slots_after_prefill"),
)


class Hooks:
    """The decoders of a stack during one generation.

    Attributes:
        decoders, requirements: of the stack.
        runner: what it ran is what decoders see.
        layers: l, the number of layers that decoders count.
        branches: those that decoders have.
        branch_of: by decoder, the index of its branch, or None.
        early: by decoder, the early layers whose logits it reads.
        num_candidates: candidates a row that are run before one is picked; 0 for none.
        can_roll_back: whether some decoder may ask to go back.
        prunes: whether some decoder may drop slots.
        overriding: by name of a hook, the indices of the decoders that have one of their own.
    """

    def __init__(self, decoders: Sequence[Decoder], requirements: Sequence[Requirements], runner: ModelRunner):
        self.decoders, self.requirements, self.runner = decoders, requirements, runner
        self.layers = len(runner.layers)
        self.branches = [r.branch for r in requirements if r.branch is not None]
        self.branch_of: list[int | None] = []
        for r in requirements:
            self.branch_of.append(None if r.branch is None else sum(i is not None for i in self.branch_of))
        self.early = [early_keys(runner.model, r) for r in requirements]
        self.num_candidates = max((r.lookahead for r in requirements), default=0)
        self.can_roll_back = any(r.rollback for r in requirements)
        self.overriding = {
            hook: [i for i, d in enumerate(decoders) if getattr(type(d), hook) is not getattr(Decoder, hook)]
            for hook in _ASKED
        }
        self.prunes = bool(
            self.overriding["select_slots"]
            or self.overriding["select_slots_after_prefill"]
            or any(r.edits.drops for r in requirements)
        )
        self._wants = {}

    def changing(self) -> list[str]:
        """Names of decoders that may do other things inside the forward from step to step."""
        contexts = {i for name in ("model_context", "encoding_context") for i in self.overriding[name]}
        return [
            decoder.name
            for i, (decoder, needs) in enumerate(zip(self.decoders, self.requirements, strict=True))
            if (i in contexts or (needs.edits and not needs.edits.prompt_only)) and not needs.constant_forward
        ]

    # before the first step

    def init_states(self, contexts: list[GenerationContext]) -> DecoderStates:
        """States of the main rows and of branches that prune for themselves, of what each is told."""
        every = [
            [self._init_state(context, i, branch) for i in range(len(self.decoders))]
            if branch == 0 or self.branches[branch - 1].pruning == "independent"
            else []
            for branch, context in enumerate(contexts)
        ]
        main, *branches = every
        return DecoderStates([d.name for d in self.decoders], main, branches, main)

    def _init_state(self, context: GenerationContext, i: int, branch: int) -> Any:
        """The state of decoder i, told what its hooks inside the forward kept of the images of a branch."""
        inside = self.runner.tap.inside
        told = context if inside is None else context.replace(images=inside.images[i, branch])
        with in_hook(self.decoders[i], "init_state"):
            return self.decoders[i].init_state(told)

    def make_beam_hypotheses(self, context: GenerationContext) -> Hypotheses | None:
        """The bookkeeping of finished beams that a decoder brings, or None."""
        found = []
        for decoder in self.decoders:
            with in_hook(decoder, "make_beam_hypotheses"):
                if (own := decoder.make_beam_hypotheses(context)) is not None:
                    found.append((decoder, own))
        if len(found) > 1:
            raise StackError(
                f"{found[0][0].name} and {found[1][0].name} both replace the bookkeeping of finished beams, which only"
                " one can; leave one out"
            )
        return found[0][1] if found else None

    # what decoders see

    def logits(self, output: ForwardOutput, n: int, branch: int = 0) -> Tensor:
        """float32 [n, v], the model's own, of the n main rows or those of a branch."""
        mine = slice(branch * n, (branch + 1) * n)
        return output.part(("logits", branch), lambda: output.logits[mine].to(copy=True, dtype=torch.float32))

    def early_logits(self, output: ForwardOutput, keys: tuple[Key, ...], branch: int) -> Tensor:
        """float32 [h', n, v], of hidden states of the main rows or of a branch's."""
        early = self.runner.early
        assert early is not None, "some decoder reads them"
        return early.read(output, keys, branch, self.runner.to_logits)

    def make_step(
        self, output: ForwardOutput, search: SampleSearch | BeamSearch, ahead: int = 1, branch: int = 0
    ) -> Step:
        """The newest forward, without what only some decoders read.

        Args:
            ahead: 1 while its token has not been picked, 0 once it was.
            branch: 0 for the main rows, 1 for those of the first branch, ...
        """
        sequences = search.sequences
        numbers = [g + ahead for g in sequences.generated]
        n = len(sequences.ids)
        mine = slice(branch * n, (branch + 1) * n)
        return Step.of(
            num_forwards=output.part(("number", *numbers), lambda: sequences.expand_to_rows(numbers)),
            max_num_forwards=max(numbers),
            logits=self.logits(output, n, branch),
            attention=None,
            hidden=None,
            early_logits=None,
            branch=None,
            visual=None,
            slot_positions=self.runner.slots.slot_positions()[:, mine],
            unfinished=search.unfinished,
            is_rerun=output.is_rerun,
            input_ids=sequences.ids,
            beams=sequences.size,
        )

    def view(self, output: ForwardOutput, step: Step, i: int, branch: int = 0) -> Step:
        """The step as decoder i sees it."""
        n, requirements = len(step.num_forwards), self.requirements[i]
        mine = slice(branch * n, (branch + 1) * n)
        layers, heads = requirements.resolve_layers(self.layers), requirements.head_reduction
        parts: dict[str, Any] = dict.fromkeys(("attention", "hidden", "early_logits", "branch", "visual"))
        if layers:
            parts["attention"] = output.part(
                ("attention", branch, *layers, heads), lambda: self.runner.attention(output, layers, heads, branch)
            )
        if requirements.hidden:
            parts["hidden"] = torch.stack([output.hidden[k][mine] for k in requirements.hidden])
        if early := self.early[i]:
            parts["early_logits"] = output.part(
                ("early", branch, *early), lambda: self.early_logits(output, early, branch)
            )
        if (own := self.branch_of[i]) is not None and branch == 0:
            parts["branch"] = self.logits(output, n, own + 1)
        if requirements.visual and (visual := self.runner.slots.visual_slots()) is not None:
            parts["visual"] = visual[:, mine]
        exported = {key[1]: x[mine] for key, x in output.hidden.items() if isinstance(key, tuple) and key[0] == i}
        return step.replace(**parts, exported=exported)

    # hooks

    def process_logits(self, output: ForwardOutput, search: SampleSearch | BeamSearch, states: DecoderStates) -> Tensor:
        """float32 [n, v], the model's logits as the decoders leave them."""
        scores = self.logits(output, len(search.sequences.ids))
        for i in self.overriding["process_logits"]:
            view, before = self.view(output, self.make_step(output, search), i), scores
            mine = scores.clone() if scores is view.logits else scores  # the model's own, which others read
            with in_hook(self.decoders[i], "process_logits", view.max_num_forwards):
                scores = self.decoders[i].process_logits(view, states.main[i], mine)
            if self.can_roll_back and scores is not before:
                # one may exclude what it said before going back, another all else: then the later one is not heard
                possible = (scores > -torch.inf).any(-1).view(-1, search.sequences.size).any(-1)
                scores = torch.where(possible.repeat_interleave(search.sequences.size)[:, None], scores, before)
        return scores

    # by decoder and branch, what it answered to `wants_to_prune` of the newest forward
    _wants: dict[tuple[int, int], Tensor | None]

    def wants_to_prune(
        self, output: ForwardOutput, search: SampleSearch | BeamSearch, states: DecoderStates, ahead: int
    ) -> Tensor | None:
        """bool [], whether some row may drop slots; None where decoders are to be asked for them in any case.

        Args:
            ahead: as in `make_step`.
        """
        who = self.overriding["select_slots"]
        self._wants = {}
        for branch, mine in enumerate([states.main, *states.branches]):
            if who and mine:
                step = self.make_step(output, search, ahead, branch)
                for i in who:
                    view = self.view(output, step, i, branch)
                    with in_hook(self.decoders[i], "wants_to_prune", view.max_num_forwards):
                        self._wants[i, branch] = self.decoders[i].wants_to_prune(view, mine[i])
        known = [answer for answer in self._wants.values() if answer is not None]
        if len(known) < len(self._wants) or not known:
            return None
        return functools.reduce(torch.logical_or, known).any()

    def select_slots(
        self, hook: str, output: ForwardOutput, search: SampleSearch | BeamSearch, states: DecoderStates, ahead: int
    ) -> bool:
        """Ask the decoders what stays, and make rows see no more than what all of them keep.

        Args:
            hook: `select_slots`, or `select_slots_after_prefill`.
            ahead: as in `make_step`.

        Returns:
            Whether anybody answered.
        """
        if not self.overriding[hook]:
            return False
        step = self.make_step(output, search, ahead)
        main = self._kept(hook, output, step, states.main, 0)
        kept = [main]
        for j, branch in enumerate(self.branches, 1):
            if branch.pruning == "none" or (branch.pruning == "mirror" and main is None):
                kept.append(None)
            elif branch.pruning == "mirror" and main is not None:
                kept.append(self.runner.mirror.map_slots(main, j, self.runner.slots, True))
            else:
                seen = self.make_step(output, search, ahead, j)
                kept.append(self._kept(hook, output, seen, states.branches[j - 1], j))
        known = [k for k in kept if k is not None]
        if not known:
            return False
        layers = max(len(k) for k in known)
        every = [
            known[0].new_ones(layers, *known[0].shape[1:]) if k is None else k.expand(layers, -1, -1) for k in kept
        ]
        self.runner.slots.keep(torch.cat(every, 1) if len(every) > 1 else every[0])
        return True

    def _kept(self, hook: str, output: ForwardOutput, step: Step, states: list[Any], branch: int) -> Tensor | None:
        slots = None
        for i in self.overriding[hook]:
            view = self.view(output, step, i, branch)
            with in_hook(self.decoders[i], hook, view.max_num_forwards):
                kept = getattr(self.decoders[i], hook)(view, states[i])
            if kept is not None:
                wants = self._wants.get((i, branch)) if hook == "select_slots" else None
                if wants is not None:  # rows in which this decoder had nothing to drop
                    kept = kept | ~wants[:, None]
                slots = kept if slots is None else slots & kept
        return slots

    def add_attention_bias(self, states: DecoderStates) -> None:
        """Let the decoders change what the next forward attends to."""
        who = self.overriding["attention_bias"]
        if not who:
            return
        positions, visual = self.runner.slots.slot_positions(), self.runner.slots.visual_slots()
        n = positions.shape[1] // self.runner.ways
        parts: list[Tensor | None] = []
        for branch, mine in enumerate([states.main, *states.branches]):
            rows = slice(branch * n, (branch + 1) * n)
            cache = CacheView.of(visual=None if visual is None else visual[:, rows], slot_positions=positions[:, rows])
            found = []
            for i in who if mine else ():
                with in_hook(self.decoders[i], "attention_bias"):
                    if (bias := self.decoders[i].attention_bias(cache, mine[i])) is not None:
                        found.append(bias)
            joined = functools.reduce(torch.add, found) if found else None
            if branch and not mine and self.branches[branch - 1].pruning == "mirror" and parts[0] is not None:
                joined = self.runner.mirror.map_slots(parts[0], branch, self.runner.slots, 0)
            parts.append(joined)
        self.runner.add_bias(parts)

    def rescore_candidates(
        self,
        output: ForwardOutput,
        search: SampleSearch | BeamSearch,
        states: DecoderStates,
        run: CandidateRun,
        candidates: Candidates,
        scores: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores after the decoders' judgement; and long [n], the number of generated tokens that each row goes back
        to, a large one for rows that stay. None where nobody may ask.
        """
        asked = None
        for i in self.overriding["rescore_candidates"]:
            layers, heads = self.requirements[i].resolve_layers(self.layers), self.requirements[i].head_reduction
            rows = run.with_itself(self.runner.attention(run.output, layers, heads, 0)) if layers else None
            c = self.requirements[i].lookahead  # other decoders may have more
            judged = replace(
                candidates,
                tokens=candidates.tokens[:, :c],
                scores=candidates.scores[:, :c],
                attention=None if rows is None else rows[:, :, :c],
            )
            view = self.view(output, self.make_step(output, search), i)
            with in_hook(self.decoders[i], "rescore_candidates", view.max_num_forwards):
                scores, back = self.decoders[i].rescore_candidates(view, judged, states.main[i], scores)
            if back is not None:
                far = torch.iinfo(back.dtype).max
                back = back.masked_fill((back < 0) | ~view.unfinished, far)  # rows that have finished stay
                asked = back if asked is None else torch.minimum(asked, back)
        return scores, asked
