"""The decoding loop: it runs the model, asks the decoders of a stack, and lets the search pick."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import hf
from .beams import BeamSearch
from .compiled import choose
from .early import EarlyLogits
from .errors import StackError, in_hook
from .hooks import Hooks
from .inputs import PreparedInputs
from .interface import GenerationContext
from .outputs import CandidateRun, ForwardOutput, StepOutputs
from .prompts import leave_cache, prefill
from .rollback import History
from .search import SampleSearch, Selection, Sequences
from .views import Candidates


@dataclass
class HostAnswers:
    """What the host must know of a step, asked of the device at once.

    Attributes:
        unfinished: whether another step is needed.
        beams_finished: long [n], the rows that finished beams come from (`finished_beam_sources`), where some joined
            them; else None.
        targets: by group, the number of generated tokens that it goes back to, -1 for those that stay; None if all do.
        prunes: whether some row may drop slots.
        candidate: long [n], which of its candidates that were run each row picked; None where one picked another.
    """

    unfinished: bool
    beams_finished: Tensor | None = None
    targets: list[int] | None = None
    prunes: bool = True
    candidate: Tensor | None = None


@dataclass
class Generation:
    """One run of the loop.

    Attributes:
        hooks: the decoders of the stack, and what they ask for.
        inputs: what is prefilled, a row an image.
        expanded: the same as transformers expanded it for beams and returned sequences.
        visual: bool [m, prompt], the visual tokens, or None where nobody asks.
        seeds: of each image.
        processors, criteria, streamer: as `generate` hands them over.
        compile: how decode steps are run (`compiled.py`).
    """

    hooks: Hooks
    inputs: PreparedInputs
    expanded: PreparedInputs
    visual: Tensor | None
    seeds: list[int]
    processors: Any
    criteria: Any
    streamer: Any
    compile: str = "off"

    def run(self):
        """The loop, from the prompt to the end."""
        hooks, runner = self.hooks, self.hooks.runner
        output = self.begin()
        states, search, history = self.states, self.search, self.history
        last = self.expanded.config.max_length - search.sequences.start - 1
        while True:
            output = runner.make_room(output, hooks.num_candidates, history.slots)
            generated = search.sequences.generated
            # which token of the answer comes next; rows that have ended wait at the last there can be
            index = search.sequences.expand_to_rows([min(g, last) for g in generated])
            if hooks.can_roll_back:
                history.save(generated, states, search, runner)
            scores = hooks.process_logits(output, search, states)
            run = asked = prunes = None
            if hooks.num_candidates:
                hooks.wants_to_prune(output, search, states, ahead=1)
                hooks.select_slots("select_slots", output, search, states, ahead=1)
                run, candidates = self.forward_candidates(scores, index)
            scores = search.to_search_scores(scores)
            if run is not None:
                scores, asked = hooks.rescore_candidates(output, search, states, run, candidates, scores)
            scores = search.sequences.apply_logits_processors(self.processors, scores)
            self.outputs.add(output.output, hooks.logits(output, len(index)), scores, search.sequences)
            selection = search.select_next(scores, run is not None)
            search.append(selection, self.outputs)
            ended, slots = states.main, runner.save_slots()
            if run is None:
                output = self.reorder(output, selection)
                prunes = hooks.wants_to_prune(output, search, states, ahead=0)
            answers = self.ask(selection, generated, asked, run, prunes)
            if answers.targets is not None:
                output = self.roll_back(answers.targets, generated)
                continue
            if hooks.can_roll_back:
                history.add_choice(generated, selection)
            if answers.beams_finished is not None:
                states.finish(answers.beams_finished, ended)
                runner.finish_beams(answers.beams_finished, slots)
            if self.streamer is not None:
                self.streamer.put(selection.tokens.cpu())
            if not answers.unfinished:
                return self.finish()
            if run is not None and answers.candidate is not None:
                output = self.commit_candidates(run, selection, answers.candidate)
                continue
            if run is not None:
                output = self.reorder(output, selection)
            elif answers.prunes:
                hooks.select_slots("select_slots", output, search, states, ahead=0)
            hooks.add_attention_bias(states)
            output = runner.decode_step(selection.tokens, index)

    # the prompt and the end

    def begin(self) -> ForwardOutput:
        """Run the prompts, prune before the first token where that is asked for, and make the rows of the search."""
        hooks, runner = self.hooks, self.hooks.runner
        ids, config = self.expanded.input_ids, self.expanded.config
        b, n, start = len(self.inputs.input_ids), len(ids), ids.shape[1]
        if self.streamer is not None:
            self.streamer.put(ids.cpu())
        output = prefill(runner, self.visual)
        shown = bool(config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states))
        runner.compiled = choose(self.compile, runner, config.max_length - start, shown, hooks.changing())
        runner.masks_by_layer = runner.compiled is not None and hooks.prunes
        runner.read = tuple(sorted(set().union(*(r.hidden_states for r in hooks.requirements))))
        runner.early = EarlyLogits.of(runner.model, itertools.chain(*hooks.early), runner.ways)
        pad = hf.pad_id(config) or 0
        contexts = self._contexts()
        self.states = hooks.init_states(contexts)
        if not runner.takes_positions and (hooks.prunes or hooks.num_candidates):
            raise StackError(
                f"{type(runner.model).__name__} takes its positions from the length of its cache, which pruning changes"
                " and candidates share; leave out what prunes or looks ahead"
            )
        prompts = SampleSearch(config, self.criteria, Sequences(self.inputs.input_ids, [start] * b, start, 1, pad))
        output = runner.make_room(output, hooks.num_candidates)
        if hooks.select_slots("select_slots_after_prefill", output, prompts, self.states, ahead=1):
            hooks.add_attention_bias(self.states)
            output = runner.rerun_last_prompt_token()
        rows = torch.arange(b, device=ids.device).repeat_interleave(n // b)
        output = runner.expand(output, n // b)
        if n != b:
            self.states.select(rows, b)
            self.states.finished = self.states.main
        self.search: SampleSearch | BeamSearch
        if config.num_beams > 1:
            eos = hf.eos_ids(config)
            fill = pad or eos[0] if eos else -1
            sequences = Sequences(ids, [start] * (n // config.num_beams), start, config.num_beams, fill)
            hypotheses = hooks.make_beam_hypotheses(contexts[0])
            self.search = BeamSearch(config, self.criteria, sequences, hypotheses)
        else:
            sequences = Sequences(ids, [start] * n, start, 1, pad)
            self.search = SampleSearch(config, self.criteria, sequences, hooks.can_roll_back)
        self.outputs = StepOutputs(config, n, rows)
        self.history = History(len(self.search.sequences.lengths), self.search.sequences.size)
        return output

    def _contexts(self) -> list[GenerationContext]:
        """The generation as decoders see it in `init_state`: of the main rows, and of each branch's."""
        runner, b, contexts = self.hooks.runner, len(self.inputs.input_ids), []
        for i in range(runner.ways):
            visual = None if self.visual is None else self.visual[i * b : (i + 1) * b]
            contexts.append(
                GenerationContext.of(
                    model=runner.model,
                    rows=b,
                    layers=self.hooks.layers,
                    visual=visual,
                    seeds=self.seeds,
                    device=self.inputs.input_ids.device,
                    prompt=runner.prompt,
                    offset=runner.prompt - (self.inputs, *runner.branches)[i].prompt,
                    input_ids=self.inputs.input_ids,
                    config=self.expanded.config,
                    eos=hf.eos_ids(self.expanded.config),
                    to_logits=runner.to_logits,
                    images={},
                )
            )
        return contexts

    def finish(self):
        """What `generate` returns; `states.main` are then those of the rows returned."""
        search, states, config = self.search, self.states, self.expanded.config
        if self.streamer is not None:
            self.streamer.end()
        ids, beams = search.result()
        if search.sequences.size == 1:  # of beams, transformers returns those of all steps
            self.outputs.crop(ids.shape[1] - search.sequences.start)
        k, known = search.sequences.size, search.finished_beam_sources() is not None
        if k > 1:
            n = len(search.unfinished)
            returned = torch.arange(n, device=ids.device).view(-1, k)[:, : config.num_return_sequences].flatten()
            if known:
                states.main = states.finished
            states.select(returned, n)
        if not config.return_dict_in_generate:
            return ids
        lengths, unknown = search.sequences.lengths, None
        if k > 1:
            lengths = ((beams["beam_indices"] >= 0).sum(1) + search.sequences.start).tolist()
            unknown = None if known else "it is not known which slots its finished beams saw"
        rows = config.num_return_sequences if k > 1 else None
        cache = leave_cache(self.hooks.runner, ids, lengths, rows, not self.hooks.decoders, unknown)
        return self.outputs.result(ids, cache, beams)

    # a step

    def forward_candidates(self, scores: Tensor, index: Tensor) -> tuple[CandidateRun, Candidates]:
        """Run the best tokens of each row, as its token `index`, long [n], of the answer."""
        hooks, runner = self.hooks, self.hooks.runner
        best, tokens = scores.topk(min(hooks.num_candidates, scores.shape[-1]))
        n, length = len(tokens), runner.slots.used
        positions = runner.slots.slot_positions()[:, :n, :length]
        # with the candidate itself at the end
        itself = (index + runner.prompt)[None, :, None].expand(len(positions), -1, 1)
        visual = runner.slots.visual_slots()
        if visual is not None:
            visual = torch.nn.functional.pad(visual[:, :n, :length], (0, 1))
        hooks.add_attention_bias(self.states)
        run = runner.forward_candidates(self.search.pad_finished(tokens), index)
        return run, Candidates(tokens, best, None, visual, torch.cat([positions, itself], -1))

    def reorder(self, output: ForwardOutput, selection: Selection) -> ForwardOutput:
        """Row i becomes the row that it continues, in the states, the cache and what the newest forward showed."""
        if selection.parents is None:
            return output
        self.states.select(selection.parents, len(selection.tokens))
        return self.hooks.runner.reorder(output, selection.parents)

    def commit_candidates(self, run: CandidateRun, selection: Selection, candidate: Tensor) -> ForwardOutput:
        """Row i becomes the row that it continues and that row's candidate `candidate[i]`, which was run already."""
        if selection.parents is not None:
            self.states.select(selection.parents, len(selection.tokens))
        return self.hooks.runner.commit_candidates(run, selection.rows(), candidate)

    def ask(
        self,
        selection: Selection,
        generated: list[int],
        asked: Tensor | None,
        run: CandidateRun | None,
        prunes: Tensor | None,
    ) -> HostAnswers:
        """The questions of a step that only the device can answer, all at once.

        Args:
            asked: long [n], the number of generated tokens that rows go back to, at least `generated` for those that
                stay; or None.
            prunes: bool [], whether some row may drop slots; or None for yes.
        """
        search, hooks, slots = self.search, self.hooks, self.hooks.runner.slots if self.hooks.runner.tables else None
        sources, n = search.finished_beam_sources(), len(selection.tokens)
        candidate = None
        questions = {"unfinished": search.any_unfinished()}
        if sources is not None and (hooks.decoders or self.expanded.config.return_dict_in_generate):
            questions["finished"] = (sources != torch.arange(n, 2 * n, device=sources.device)).any()
        if slots is not None and slots.dropped:
            questions["most"] = slots.most_seen()
        if prunes is not None:
            questions["prunes"] = prunes
        if run is not None:
            candidate, inside = run.find(selection)
            questions["inside"] = (inside | ~search.unfinished).all()
        flat = [value.view(1) for value in questions.values()]
        if asked is not None:
            flat.append(asked.view(-1, self.search.sequences.size).amin(1))
        known = torch.cat(flat).tolist() if len(flat) > 1 else [bool(flat[0])]  # `cat` makes one type of them
        answers = dict(zip(questions, known, strict=False))
        if "most" in answers and slots is not None:
            slots.note_most_seen(answers["most"])
        targets = None
        if asked is not None:
            targets = [t if t <= g else -1 for t, g in zip(known[len(questions) :], generated, strict=True)]
            if any(t == 0 for t in targets):
                raise StackError(
                    "a decoder asked to go back to before the first token, which comes from the prompt; the least is 1"
                )
        return HostAnswers(
            bool(answers["unfinished"]),
            sources if answers.get("finished") else None,
            targets if targets is not None and any(t > 0 for t in targets) else None,
            bool(answers.get("prunes", True)),
            candidate if answers.get("inside") else None,
        )

    def roll_back(self, targets: list[int], generated: list[int]) -> ForwardOutput:
        """Each group returns to where it had generated `targets[g]` tokens; -1 to where it stood before this step."""
        hooks, runner = self.hooks, self.hooks.runner
        went = self.history.roll_back(targets, generated, self.states, self.search, runner)
        for states in (self.states.main, *filter(None, self.states.branches)):
            for decoder, state in zip(hooks.decoders, states, strict=True):
                with in_hook(decoder, "on_rollback"):
                    decoder.on_rollback(state, went)
        sequences = self.search.sequences
        self.outputs.crop(max(sequences.generated))
        hooks.add_attention_bias(self.states)
        return runner.rerun(sequences.last_tokens(), sequences.expand_to_rows([g - 1 for g in sequences.generated]))


def seeds_by_row(seeds: tuple[int, ...] | None, rows: int) -> list[int]:
    """A seed for each row; 0 for all by default."""
    if seeds is None:
        return [0] * rows
    if rows % len(seeds):
        raise StackError(f"{len(seeds)} seeds for {rows} rows; give one an image")
    return [seed for seed in seeds for _ in range(rows // len(seeds))]
