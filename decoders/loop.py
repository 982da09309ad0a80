"""The decoding loop: it runs the model, asks the decoders of a stack, and lets the search pick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import hf
from .beams import BeamSearch
from .errors import StackError
from .interface import Branch, Cached, Candidates, Decoder, Rollback, Run, Step
from .kv_pool import BUCKET, pad_slots
from .prepare import Prepared
from .runner import CandidateRun, ForwardOutput, ModelRunner
from .search import RowSearch, Texts
from .state import Saved, each, fit, index


@dataclass
class Checkpoint:
    """Everything as it was when rows stood before a choice.

    Attributes:
        states, branch_states, finished_states: of each decoder.
        search: what was generated, and the finished beams.
        visible: what each row sees, by table of slots.
    """

    states: list[Saved]
    branch_states: list[list[Saved]]
    finished_states: list[Saved]
    search: Any
    visible: list[Tensor]


@dataclass
class Choice:
    """What the search picked for each row.

    Attributes:
        parents: long [n], the row that each continues; None where each continues itself.
        tokens: long [n].
        at: long [n], which token of the answer it is.
    """

    parents: Tensor | None
    tokens: Tensor
    at: Tensor

    def rows(self) -> Tensor:
        """long [n], `parents`, also where each row continues itself."""
        return torch.arange(len(self.tokens), device=self.tokens.device) if self.parents is None else self.parents


class Generation:
    """One run of the loop."""

    def __init__(
        self,
        decoders,
        reads,
        runner: ModelRunner,
        visual: Tensor | None,
        full: Prepared,
        given: Prepared,
        seeds: list[int],
        layers: int,
        processors,
        criteria,
        streamer,
    ):
        self.decoders, self.reads, self.runner, self.config = decoders, reads, runner, full.config
        self.layers, self.processors, self.criteria, self.given, self.streamer = (
            layers,
            processors,
            criteria,
            given,
            streamer,
        )
        self.visual, self.full, self.seeds = visual, full, seeds
        self.b = len(given.input_ids)
        self.lookahead = max((r.lookahead for r in reads), default=0)
        self.returns = any(r.rollback for r in reads)
        self.branch_of: list[int | None] = []
        for one in reads:
            self.branch_of.append(None if one.branch is None else sum(i is not None for i in self.branch_of))
        self.ways: list[Branch] = [r.branch for r in reads if r.branch is not None]
        self.prunes = bool(self._overriding("observe"))
        self.size = 1  # rows that go back together: the beams of an image, or one row

    def _overriding(self, hook: str) -> list[int]:
        """The decoders that have a hook of their own."""
        return [i for i, d in enumerate(self.decoders) if getattr(type(d), hook) is not getattr(Decoder, hook)]

    def run(self):
        """The loop, from the prompt to the end."""
        output = self.begin()
        while True:
            output = self.make_room(output)
            if self.returns:
                self.save_checkpoint()
            step = self.step(output)
            scores = self.score(output, step)
            run = candidates = None
            if self.lookahead:
                self.prune(output, step, "observe")
                run, candidates = self.forward_candidates(scores)
            scores = self.search.scale(scores)
            if run is not None and candidates is not None:
                scores, targets = self.review(output, step, run, candidates, scores)
                if targets is not None:
                    output = self.roll_back(targets)
                    continue
            scores = self.search.texts.process(self.processors, scores)
            self.outputs.add(output.output, step.logits, scores, self.search.texts)
            choice = self.pick(scores)
            goes_on, inside = self.ask(choice, candidates)
            if not goes_on:
                return self.finish()
            output = self.reorder(output, choice)
            if run is None:
                if self.prunes:
                    self.prune(output, self.step(output, 0), "observe")
                output = self.decode_step(choice)
            elif inside is not None:
                output = self.runner.commit_candidates(run, choice.rows(), inside)
            else:
                self.runner.reorder(choice.rows())
                output = self.decode_step(choice)

    # the prompt and the end

    def begin(self) -> ForwardOutput:
        """Run the prompts, prune before the first token where that is asked for, and make the rows of the search."""
        runner, full, config = self.runner, self.full, self.config
        if self.streamer is not None:
            self.streamer.put(full.input_ids.cpu())
        output = runner.prefill()
        eos, pad = hf.eos_ids(config), hf.pad_id(config)
        runs = self._runs(eos)
        self.states = [decoder.start(runs[0]) for decoder in self.decoders]
        self.branch_states = [
            [d.start(run) for d in self.decoders] if way.prunes == "own" else []
            for way, run in zip(self.ways, runs[1:], strict=True)
        ]
        if not runner.takes_positions and (self.prunes or self.lookahead or self._overriding("before_first_token")):
            raise StackError(
                f"{type(runner.model).__name__} takes its positions from the length of its cache, which pruning changes"
                " and candidates share; leave out what prunes or looks ahead"
            )
        self.again, start, n = False, full.input_ids.shape[1], len(full.input_ids)
        self.search: RowSearch | BeamSearch = RowSearch(
            config, self.criteria, Texts(self.given.input_ids, [start] * self.b, start, 1, pad or 0)
        )
        output = self.make_room(output)
        if self.prune(output, self.step(output), "before_first_token"):
            self.add_bias()
            output = runner.rerun(runner.last_prompt_tokens(), torch.full((self.b,), -1, device=full.input_ids.device))
            self.again = True
        rows = torch.arange(self.b, device=full.input_ids.device).repeat_interleave(n // self.b)
        runner.expand(n // self.b)
        if n != self.b:
            self._select_states(rows, self.b)
            every = runner.to_all_branches(rows, self.b)
            if len(output.logits) == self.b * runner.ways:
                output = output.map(lambda x: x[every])
            if self.visual is not None:
                self.visual = self.visual[every]
        if config.num_beams > 1:
            self.size = config.num_beams
            texts = Texts(
                full.input_ids, [start] * (n // self.size), start, self.size, -1 if not eos else pad or eos[0]
            )
            self.search = BeamSearch(config, self.criteria, texts, self._hypotheses(runs[0]))
        else:
            self.search = RowSearch(config, self.criteria, Texts(full.input_ids, [start] * n, start, 1, pad or 0))
        self.outputs = _Outputs(config, n, rows)
        self.finished_states = self.states
        groups = len(self.search.texts.lengths)
        self.checkpoints: list[dict[int, Checkpoint]] = [{} for _ in range(groups)]
        self.choices: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(groups)]
        return output

    def _runs(self, eos: tuple[int, ...]) -> list[Run]:
        """The generation as decoders see it in `start`: of the main rows, and of each branch's."""
        runner, runs = self.runner, []
        for i in range(runner.ways):
            visual = None if self.visual is None else self.visual[i * self.b : (i + 1) * self.b]
            runs.append(
                Run.of(
                    model=runner.model,
                    rows=self.b,
                    layers=self.layers,
                    visual=visual,
                    seeds=self.seeds,
                    device=self.full.input_ids.device,
                    prompt=runner.prompt,
                    text_prompt=self.given.input_ids,
                    config=self.config,
                    eos=eos,
                    head=runner.head,
                )
            )
        return runs

    def _hypotheses(self, run: Run):
        found = [(d, h) for d in self.decoders if (h := d.hypotheses(run)) is not None]
        if len(found) > 1:
            raise StackError(
                f"{found[0][0].name} and {found[1][0].name} both replace the bookkeeping of finished beams, which only"
                " one can; leave one out"
            )
        return found[0][1] if found else None

    def finish(self):
        """What `generate` returns; `states` are then those of the rows returned."""
        if self.streamer is not None:
            self.streamer.end()
        ids, more = self.search.result()
        if self.size > 1:
            count = self.config.num_return_sequences
            rows = torch.arange(len(self.search.alive), device=ids.device).view(-1, self.size)[:, :count].flatten()
            if self.search.entered() is not None:
                self.states = self.finished_states
            self._select_states(rows, len(self.search.alive))
        if not self.config.return_dict_in_generate:
            return ids
        return self.outputs.result(ids, self.runner.leave_cache(bool(self.decoders)), more)

    # what the decoders see

    def step(self, output: ForwardOutput, ahead: int = 1, branch: int = 0) -> Step:
        """The newest forward, without what only some decoders read.

        Args:
            ahead: 1 while its token has not been picked, 0 once it was.
        """
        texts = self.search.texts
        numbers = [g + ahead for g in texts.generated]
        number = texts.rows(numbers)
        mine = slice(branch * len(number), (branch + 1) * len(number))
        return Step.of(
            number=number,
            longest=max(numbers),
            logits=output.part(("logits", branch), lambda: output.logits[mine].to(copy=True, dtype=torch.float32)),
            attention=None,
            hidden=None,
            branch=None,
            visual=None,
            origin=self.runner.slots.origin()[:, mine] if self.decoders else None,
            alive=self.search.alive,
            again=self.again,
            input_ids=texts.ids,
            beams=self.size,
        )

    def view(self, output: ForwardOutput, step: Step, i: int, branch: int = 0) -> Step:
        """The step as decoder i sees it."""
        n, reads = len(step.number), self.reads[i]
        mine = slice(branch * n, (branch + 1) * n)
        layers = reads.layers(self.layers)
        parts: dict[str, Tensor | None] = dict.fromkeys(("attention", "hidden", "branch", "visual"))
        if layers:
            rows = output.part(
                ("attention", branch, *layers, reads.heads),
                lambda: torch.stack([output.attention[layer, reads.heads][mine] for layer in layers]),
            )
            parts["attention"] = pad_slots(rows, step.origin.shape[-1])  # there may be more slots by now
        if reads.hidden:
            parts["hidden"] = torch.stack([output.hidden[k][mine] for k in reads.hidden])
        if (own := self.branch_of[i]) is not None and branch == 0:
            parts["branch"] = output.logits[(own + 1) * n : (own + 2) * n].float()
        if self.visual is not None:
            parts["visual"] = _visual(step.origin, self.visual[mine])
        return step.replace(**parts)

    def score(self, output: ForwardOutput, step: Step) -> Tensor:
        scores = step.logits
        for i in self._overriding("score"):
            scores = self.decoders[i].score(self.view(output, step, i), self.states[i], scores)
        return scores

    def prune(self, output: ForwardOutput, step: Step, hook: str) -> bool:
        """Ask the decoders what stays and intersect their answers; whether anything was dropped."""
        who = self._overriding(hook)
        if not who:
            return False
        kept = [self._kept(output, step, hook, who, self.states, 0)]
        for j, way in enumerate(self.ways, 1):
            if way.prunes == "copied":
                if hook == "before_first_token" or step.longest == 1:
                    self._check_alike(j)
                kept.append(kept[0])
            else:
                ahead = step.longest - max(self.search.texts.generated)
                one = self.step(output, ahead, j)
                kept.append(self._kept(output, one, hook, who, self.branch_states[j - 1], j))
        known = [k for k in kept if k is not None]
        if not known:
            return False
        layers = max(len(k) for k in known)
        everything = known[0].new_ones(layers, *known[0].shape[1:])
        self.runner.slots.keep(torch.cat([everything if k is None else k.expand(layers, -1, -1) for k in kept], 1))
        return True

    def _kept(
        self, output: ForwardOutput, step: Step, hook: str, who: list[int], states: list, branch: int
    ) -> Tensor | None:
        slots = None
        for i in who:
            kept = getattr(self.decoders[i], hook)(self.view(output, step, i, branch), states[i])
            if kept is not None:
                slots = kept if slots is None else slots & kept
        return slots

    def _check_alike(self, branch: int) -> None:
        """Slots can be copied to a branch only if its prompt has the same tokens in the same places."""
        origin = self.runner.slots.origin()
        n = origin.shape[1] // self.runner.ways
        rows = [slice(i * n, (i + 1) * n) for i in (0, branch)]
        visual = self.visual
        same = torch.equal(origin[:, rows[0]], origin[:, rows[1]])
        if not same or (visual is not None and not torch.equal(visual[rows[0]], visual[rows[1]])):
            raise StackError(
                "the prompt of a branch differs in its tokens from the main one, so what is pruned there cannot be"
                " copied; let the branch prune for itself (prunes='own')"
            )

    def add_bias(self) -> None:
        """Let the decoders change what the next forward attends to."""
        who = self._overriding("attend")
        if not who:
            return
        origin = self.runner.slots.origin()
        n = origin.shape[1] // self.runner.ways
        parts: list[Tensor | None] = []
        own = [
            [] if way.prunes == "copied" else states for way, states in zip(self.ways, self.branch_states, strict=True)
        ]
        for branch, states in enumerate([self.states, *own]):
            mine = slice(branch * n, (branch + 1) * n)
            visual = None if self.visual is None else _visual(origin[:, mine], self.visual[mine])
            cached = Cached.of(visual=visual, origin=origin[:, mine])
            found = [b for i in who if states and (b := self.decoders[i].attend(cached, states[i])) is not None]
            parts.append(sum(found) if found else None if states else parts[0])
        self.runner.add_bias(parts)

    # a step

    def make_room(self, output: ForwardOutput) -> ForwardOutput:
        """See that the pool has room for a step. What was read of slots moves with them."""
        points = {id(point): point for group in getattr(self, "checkpoints", ()) for point in group.values()}
        # candidates; one more where none of them is picked; one to run the newest token again
        move = self.runner.make_room(self.lookahead + 2, [point.visible for point in points.values()])
        if move is None:
            return output
        attention = {(layer, heads): move.layer(layer, x) for (layer, heads), x in output.attention.items()}
        return ForwardOutput(output.logits, attention, output.hidden, output.output)

    def at(self) -> Tensor:
        """Which token of the answer comes next, long [n]."""
        return self.search.texts.rows(self.search.texts.generated)

    def forward_candidates(self, scores: Tensor) -> tuple[CandidateRun, Candidates]:
        """Run the best tokens of each row."""
        best, tokens = scores.topk(min(self.lookahead, scores.shape[-1]))
        slots, n, at = self.runner.slots, len(tokens), self.at()
        origin = slots.origin()[:, :n, : slots.used]  # with the place of the candidate itself at the end
        itself = (at + self.runner.prompt)[None, :, None].expand(len(origin), -1, 1)
        origin = torch.cat([origin, itself], -1)
        visual = None if self.visual is None else _visual(origin, self.visual[:n])
        self.add_bias()
        run = self.runner.forward_candidates(tokens, at)
        return run, Candidates(tokens, best, None, visual, origin)

    def review(
        self, output: ForwardOutput, step: Step, run: CandidateRun, candidates: Candidates, scores: Tensor
    ) -> tuple[Tensor, list[int] | None]:
        """Scores after the decoders' judgement, and the tokens that each group goes back to, -1 to stay; None if all
        stay.
        """
        asked, n = None, len(scores)
        for i in self._overriding("review"):
            layers, heads = self.reads[i].layers(self.layers), self.reads[i].heads
            rows = [run.attention(layer, heads, n) for layer in layers]
            judged = replace(candidates, attention=torch.stack(rows) if rows else None)
            scores, back = self.decoders[i].review(self.view(output, step, i), judged, self.states[i], scores)
            if back is not None:
                far = torch.iinfo(back.dtype).max
                back = back.masked_fill((back < 0) | ~step.alive, far)  # rows that have finished stay
                asked = back if asked is None else torch.minimum(asked, back)
        if asked is None:
            return scores, None
        targets = asked.view(-1, self.size).amin(1).tolist()
        generated = self.search.texts.generated
        targets = [t if t <= g else -1 for t, g in zip(targets, generated, strict=True)]
        if any(t == 0 for t in targets):
            raise StackError(
                "a decoder asked to go back to before the first token, which comes from the prompt; the least is 1"
            )
        return scores, targets if any(t > 0 for t in targets) else None

    def pick(self, scores: Tensor) -> Choice:
        """Let the search pick a token for each row, and grow by it."""
        parents, tokens = self.search.pick(scores, self.lookahead > 0)
        choice = Choice(parents, tokens, self.at())
        if self.returns:  # for decoders that later go back to before it
            for g, at in enumerate(self.search.texts.generated):
                mine = slice(g * self.size, (g + 1) * self.size)
                self.choices[g][at] = choice.rows()[mine], tokens[mine]
        self.search.advance(parents, tokens, self.outputs)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return choice

    def ask(self, choice: Choice, candidates: Candidates | None) -> tuple[bool, Tensor | None]:
        """The questions of a step that the device must answer, all at once.

        Returns:
            Whether another step is needed; and, if all rows picked one of their candidates, which, long [n].
        """
        entered, n = self.search.entered(), len(choice.tokens)
        counts = [self.search.running().long()]
        if entered is not None and self.decoders:
            counts.append((entered != torch.arange(n, 2 * n, device=entered.device)).any().long())
        if self.prunes:
            counts.append(self.runner.slots.alive().to(counts[0].device))
        inside = None
        if candidates is not None:
            match = candidates.tokens[choice.rows()] == choice.tokens[:, None]
            inside = match.long().argmax(1)
            counts.append((match.any(1) | ~self.search.alive).all().long())
        known = torch.stack(counts).tolist()
        if entered is not None and self.decoders and known[1]:
            self._finish_states(entered)
        if self.prunes:
            alive = known[-1 if candidates is None else -2]
            self.runner.slots.wasteful = self.runner.slots.used - alive > max(BUCKET, self.runner.slots.used // 8)
        return bool(known[0]), inside if known[-1] else None

    def _finish_states(self, rows: Tensor) -> None:
        """Keep the states of rows that end beside those of rows that ended before: rows >= n stand for the latter."""
        n = len(rows)

        def pick(new: Tensor, old: Tensor) -> Tensor:
            shape = [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:], strict=True)]
            return torch.cat([fit(new, [n, *shape]), fit(old, [n, *shape])])[rows.to(new.device)]

        self.finished_states = [
            each(now, pick, ended) for now, ended in zip(self.states, self.finished_states, strict=True)
        ]

    def _select_states(self, rows: Tensor, count: int) -> None:
        """Row i of every state becomes row `rows[i]` of the `count` there are."""
        self.states = [index(s, rows, count, d.name) for d, s in zip(self.decoders, self.states, strict=True)]
        self.branch_states = [
            [index(s, rows, count, d.name) for d, s in zip(self.decoders, states, strict=False)]
            for states in self.branch_states
        ]

    def reorder(self, output: ForwardOutput, choice: Choice) -> ForwardOutput:
        """Row i becomes row `parents[i]`, in every state; where no candidates were run, in the cache and in what was
        seen as well.
        """
        if choice.parents is None:
            return output
        self._select_states(choice.parents, len(choice.tokens))
        if self.lookahead:
            return output
        self.runner.reorder(choice.parents)
        every = self.runner.to_all_branches(choice.parents, len(choice.tokens))
        return output.map(lambda x: x[every])

    def decode_step(self, choice: Choice) -> ForwardOutput:
        """Run the tokens picked."""
        self.again = False
        self.add_bias()
        return self.runner.decode_step(choice.tokens, choice.at)

    # going back

    def save_checkpoint(self) -> None:
        """Remember everything as it is now, for groups that stand here for the first time."""
        new = [g for g, at in enumerate(self.search.texts.generated) if at not in self.checkpoints[g]]
        if not new:
            return
        names = [d.name for d in self.decoders]
        save = lambda states: [Saved(s, who) for s, who in zip(states, names, strict=False)]  # noqa: E731
        point = Checkpoint(
            save(self.states),
            [save(states) for states in self.branch_states],
            save(self.finished_states),
            self.search.save(),
            self.runner.save(),
        )
        for g in new:
            self.checkpoints[g][self.search.texts.generated[g]] = point

    def roll_back(self, targets: list[int]) -> ForwardOutput:
        """Each group returns to where it had generated `targets[g]` tokens; -1 to where it is, before this step."""
        generated = self.search.texts.generated
        points = [self.checkpoints[g][t if t > 0 else generated[g]] for g, t in enumerate(targets)]
        device = self.given.input_ids.device
        rows = lambda flags: torch.tensor(flags, device=device).repeat_interleave(self.size)  # noqa: E731
        for point in {id(point): point for point in points}.values():
            flags = [point is one for one in points]
            mine = None if all(flags) else rows(flags)
            back = lambda saved, now: [s.back(n, mine) for s, n in zip(saved, now, strict=True)]  # noqa: B023, E731
            self.states = back(point.states, self.states)
            self.branch_states = [back(*pair) for pair in zip(point.branch_states, self.branch_states, strict=True)]
            self.finished_states = back(point.finished_states, self.finished_states)
        self.search.restore([point.search for point in points])
        self.runner.restore([point.visible for point in points], self.size)
        choices = [self.choices[g].get(t) for g, t in enumerate(targets)]
        none = torch.full((self.size,), -1, device=device)
        parents, tokens = (torch.cat([none if one is None else one[i] for one in choices]) for i in (0, 1))
        back_to = Rollback(rows([t > 0 for t in targets]), rows(targets), parents, tokens)
        for g, t in enumerate(targets):
            if t > 0:
                self.checkpoints[g] = {at: point for at, point in self.checkpoints[g].items() if at <= t}
        for decoder, state in zip(self.decoders, self.states, strict=True):
            decoder.rolled_back(state, back_to)
        self.outputs.cut(max(self.search.texts.generated))
        texts = self.search.texts
        self.add_bias()
        return self.runner.rerun(texts.last(), texts.rows([g - 1 for g in texts.generated]))


def _visual(origin: Tensor, prompt_mask: Tensor) -> Tensor:
    """bool [l or 1, n, t]: the slots that hold visual tokens, from their tokens, `origin`, and the prompt's mask,
    [n, prompt].
    """
    at = origin.clamp(0, prompt_mask.shape[1] - 1)
    inside = (origin >= 0) & (origin < prompt_mask.shape[1])
    return prompt_mask.expand(at.shape[0], -1, -1).gather(2, at) & inside


class _Outputs:
    """What `return_dict_in_generate` collects, by token of the answer."""

    def __init__(self, config, rows: int, first: Tensor):
        self.config, self.rows, self.first = config, rows, first
        asked = config.return_dict_in_generate
        self.kept: dict[str, list] = {
            name: []
            for name in ("scores", "logits", "attentions", "hidden_states")
            if asked and getattr(config, f"output_{name}")
        }

    @property
    def scores(self) -> tuple | None:
        return tuple(self.kept["scores"]) if "scores" in self.kept else None

    def add(self, output, logits: Tensor, scores: Tensor, texts: Texts) -> None:
        for name, values in self.kept.items():
            if name in ("attentions", "hidden_states"):
                rows = self.first if not values else torch.arange(self.rows, device=logits.device)
                shown = output.get(name)
                values.append(None if shown is None else tuple(layer[rows] for layer in shown))
                continue
            value = logits if name == "logits" else scores
            if texts.even:
                values[texts.generated[0] :] = [value]
                continue
            for rows, length in texts.alike():
                at = length - texts.start
                values += [torch.zeros_like(value) for _ in range(at + 1 - len(values))]
                values[at] = values[at].index_copy(0, rows, value[rows])

    def cut(self, length: int) -> None:
        for values in self.kept.values():
            del values[length:]

    def result(self, ids: Tensor, cache: hf.Cache, more: dict):
        values = {name: tuple(values) for name, values in self.kept.items()}
        if not more:
            return hf.generate_output(ids, cache, values)
        if "scores" not in values:
            more = {**more, "sequences_scores": None}
        return hf.generate_output(ids, cache, values, more)


def per_row(seeds: tuple[int, ...] | None, rows: int) -> list[int]:
    """A seed for each row; 0 for all by default."""
    if seeds is None:
        return [0] * rows
    if rows % len(seeds):
        raise StackError(f"{len(seeds)} seeds for {rows} rows; give one an image")
    return [seed for seed in seeds for _ in range(rows // len(seeds))]
