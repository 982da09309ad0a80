"""The decoding loop: it runs the model, asks the decoders of a stack, and lets the search pick."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import hf
from .beams import BeamSearch
from .errors import StackError
from .forwards import Forwards, Seen
from .interface import Branch, Cached, Candidates, Decoder, Rollback, Run, Step
from .prepare import Prepared
from .search import RowSearch, Texts
from .state import Saved, each, fit, index


@dataclass
class _Node:
    """Everything as it was when rows stood before a choice."""

    states: list[Saved]
    watchers: list[list[Saved]]
    finished: list[Saved]
    search: Any
    slots: tuple


class Generation:
    """One run of the loop."""

    def __init__(
        self,
        decoders,
        reads,
        forwards: Forwards,
        visual: Tensor | None,
        full: Prepared,
        given: Prepared,
        seeds: list[int],
        layers: int,
        processors,
        criteria,
        streamer,
    ):
        self.decoders, self.reads, self.forwards, self.config = decoders, reads, forwards, full.config
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
        self.size = 1  # rows an image, as long as only the prompt has run

    def run(self):
        """The loop, from the prompt to the end."""
        self.begin()
        while True:
            if self.returns:
                self.remember()
            step = self.step()
            scores = self.score(step)
            tree = candidates = None
            if self.lookahead:
                candidates = self.candidates(scores)
                self.observe(step)
                self.attend()
                tree = self.forwards.tree(candidates.tokens, self.at())
                candidates = self.completed(candidates, tree)
            scores = self.search.scale(scores)
            if tree is not None and candidates is not None:
                scores, back = self.review(step, candidates, scores)
                if back is not None:
                    self.go_back(back)
                    continue
            scores = self.search.texts.process(self.processors, scores)
            self.outputs.add(self.seen.output, step.logits, scores, self.search.texts)
            parents, tokens = self.search.pick(scores, tree is not None)
            if self.returns:
                self.chosen(parents, tokens)
            at = self.at()
            self.search.advance(parents, tokens, self.outputs)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            if not self.goes_on(tree, candidates, parents, tokens):
                break
            self.move(parents, tree=tree is not None)
            if tree is None:
                self.observe(self.step(picked=True), picked=True)
                self.attend()
            self.forward(tree, candidates, parents, tokens, at)
        if self.streamer is not None:
            self.streamer.end()
        return self.finish()

    def begin(self) -> None:
        """Run the prompts, prune before the first token where that is asked for, and make the rows of the search."""
        forwards, full, config = self.forwards, self.full, self.config
        if self.streamer is not None:
            self.streamer.put(full.input_ids.cpu())
        self.look(forwards.prefill())
        eos, pad = hf.eos_ids(config), hf.pad_id(config)
        runs = []
        for i in range(len(forwards.branches) + 1):
            visual = None if self.visual is None else self.visual[i * self.b : (i + 1) * self.b]
            runs.append(
                Run.of(
                    model=forwards.model,
                    rows=self.b,
                    layers=self.layers,
                    visual=visual,
                    seeds=self.seeds,
                    device=full.input_ids.device,
                    prompt=forwards.prompt,
                    text_prompt=self.given.input_ids,
                    config=config,
                    eos=eos,
                    head=forwards.head,
                )
            )
        self.states = [decoder.start(runs[0]) for decoder in self.decoders]
        self.watchers = [
            [d.start(run) for d in self.decoders] if way.prunes == "own" else []
            for way, run in zip(self.ways, runs[1:], strict=True)
        ]
        self.again, start, n = False, full.input_ids.shape[1], len(full.input_ids)
        self.search: RowSearch | BeamSearch = RowSearch(
            config, self.criteria, Texts(self.given.input_ids, [start] * self.b, start, 1, pad or 0)
        )
        if self.observe(self.step(), first=True):
            self.attend()
            self.look(
                forwards.again(forwards.last_prompt_tokens(), torch.full((self.b,), -1, device=full.input_ids.device))
            )
            self.again = True
        rows = torch.arange(self.b, device=full.input_ids.device).repeat_interleave(n // self.b)
        forwards.expand(rows, tape=self.returns)
        self.move(rows, expand=True)
        if self.visual is not None:
            self.visual = self.visual[forwards.every(rows, self.b)]
        if config.num_beams > 1:
            self.size = config.num_beams
            texts = Texts(
                full.input_ids, [start] * (n // self.size), start, self.size, -1 if not eos else pad or eos[0]
            )
            self.search = BeamSearch(config, self.criteria, texts, self._hypotheses(runs[0]))
        else:
            self.search = RowSearch(config, self.criteria, Texts(full.input_ids, [start] * n, start, 1, pad or 0))
        self.outputs = _Outputs(config, n, rows)
        self.finished = self.states
        groups = len(self.search.texts.lengths)
        self.nodes: list[dict[int, _Node]] = [{} for _ in range(groups)]
        self.picks: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(groups)]

    def _hypotheses(self, run: Run):
        found = [(d, h) for d in self.decoders if (h := d.hypotheses(run)) is not None]
        if len(found) > 1:
            raise StackError(
                f"{found[0][0].name} and {found[1][0].name} both replace the bookkeeping of finished beams, which only"
                " one can; leave one out"
            )
        return found[0][1] if found else None

    # what the decoders see

    def look(self, seen: Seen) -> None:
        """Make `seen` what the decoders see."""
        self.seen = seen
        self._parts: dict[tuple[str, int, int], Tensor | None] = {}

    def _part(self, name: str, i: int, branch: int):
        """What decoder i reads of the rows of a branch (0: the main rows); made once a forward."""
        if (name, i, branch) not in self._parts:
            n = len(self.seen.logits) // (len(self.forwards.branches) + 1)
            rows = slice(branch * n, (branch + 1) * n)
            if name == "attention":
                layers, heads = self.reads[i].layers(self.layers), self.reads[i].heads
                value = torch.stack([self.seen.attention[layer, heads][rows] for layer in layers]) if layers else None
            elif name == "hidden":
                value = (
                    torch.stack([self.seen.hidden[k][rows] for k in self.reads[i].hidden])
                    if self.reads[i].hidden
                    else None
                )
            elif name == "branch":
                own = self.branch_of[i]
                value = None if own is None else self.seen.logits[(own + 1) * n : (own + 2) * n].float()
            elif name == "visual":
                visual = self.forwards.slots.visual(self.visual) if self.visual is not None else None
                value = None if visual is None else visual[:, rows]
            else:
                value = self.seen.logits[rows].to(copy=True, dtype=torch.float32)
            self._parts[name, i, branch] = value
        return self._parts[name, i, branch]

    def step(self, branch: int = 0, picked: bool = False) -> Step:
        """The newest forward, without what only some decoders read; `picked`: its token has been picked."""
        texts = self.search.texts
        numbers = [g + (not picked) for g in texts.generated]
        number = texts.rows(numbers)
        logits = self._part("logits", -1, branch) if self.decoders or branch == 0 else None
        n = len(number)
        origin = self.forwards.slots.origin[:, branch * n : (branch + 1) * n]
        return Step.of(
            number=number,
            longest=max(numbers),
            logits=logits,
            attention=None,
            hidden=None,
            branch=None,
            visual=None,
            origin=origin,
            alive=self.search.alive,
            again=self.again,
            input_ids=texts.ids,
            beams=self.size,
        )

    def view(self, step: Step, i: int, branch: int = 0) -> Step:
        """The step as decoder i sees it."""
        parts = {
            name: self._part(name, i if name != "visual" else -1, branch) for name in ("attention", "hidden", "visual")
        }
        return step.replace(**parts, branch=self._part("branch", i, 0) if branch == 0 else None)

    # the events of a step

    def score(self, step: Step) -> Tensor:
        scores = step.logits
        for i, (decoder, state) in enumerate(zip(self.decoders, self.states, strict=True)):
            if type(decoder).score is not Decoder.score:
                scores = decoder.score(self.view(step, i), state, scores)
        return scores

    def observe(self, step: Step, first: bool = False, picked: bool = False) -> bool:
        """Ask the decoders what to keep and intersect their answers; with `first`, ask only about the first token."""
        hook = "before_first_token" if first else "observe"
        who = [i for i, d in enumerate(self.decoders) if getattr(type(d), hook) is not getattr(Decoder, hook)]
        if not who:
            return False
        kept = [self._kept(step, hook, who, self.states, 0)]
        for j, way in enumerate(self.ways, 1):
            if way.prunes == "copied":
                if first or step.longest == 1:
                    self._check_alike(j)
                kept.append(kept[0])
            else:
                kept.append(self._kept(self.step(j, picked), hook, who, self.watchers[j - 1], j))
        known = [k for k in kept if k is not None]
        if not known:
            return False
        layers = max(len(k) for k in known)
        n, t = known[0].shape[1:]
        everything = known[0].new_ones(layers, n, t)
        slots = torch.cat([everything if k is None else k.expand(layers, -1, -1) for k in kept], 1)
        self.forwards.keep(slots, ", ".join(self.decoders[i].name for i in who))
        self._parts = {key: value for key, value in self._parts.items() if key[0] not in ("visual",)}
        return first

    def attend(self) -> None:
        """Let the decoders change what the next forward attends to."""
        who = [i for i, d in enumerate(self.decoders) if type(d).attend is not Decoder.attend]
        if not who:
            return
        slots = self.forwards.slots
        visual = slots.visual(self.visual) if self.visual is not None else None
        n = slots.origin.shape[1] // (len(self.ways) + 1)
        parts: list[Tensor | None] = []
        for branch, states in enumerate(
            [
                self.states,
                *(
                    [] if way.prunes == "copied" else watched
                    for way, watched in zip(self.ways, self.watchers, strict=True)
                ),
            ]
        ):
            rows = slice(branch * n, (branch + 1) * n)
            cached = Cached.of(visual=None if visual is None else visual[:, rows], origin=slots.origin[:, rows])
            found = [b for i in who if states and (b := self.decoders[i].attend(cached, states[i])) is not None]
            parts.append(sum(found) if found else None if states else parts[0])
        self.forwards.attend(parts)

    def _kept(self, step: Step, hook: str, who: list[int], states: list, branch: int) -> Tensor | None:
        slots = None
        for i in who:
            kept = getattr(self.decoders[i], hook)(self.view(step, i, branch), states[i])
            if kept is not None:
                slots = kept if slots is None else slots & kept
        return slots

    def _check_alike(self, branch: int) -> None:
        """Slots can be copied to a branch only if its prompt has the same tokens in the same places."""
        n = len(self.search.texts.ids)
        rows = [slice(i * n, (i + 1) * n) for i in (0, branch)]
        origin, visual = self.forwards.slots.origin, self.visual
        same = torch.equal(origin[:, rows[0]], origin[:, rows[1]])
        if not same or (visual is not None and not torch.equal(visual[rows[0]], visual[rows[1]])):
            raise StackError(
                "the prompt of a branch differs in its tokens from the main one, so what is pruned there cannot be"
                " copied; let the branch prune for itself (prunes='own')"
            )

    def candidates(self, scores: Tensor) -> Candidates:
        best, tokens = scores.topk(min(self.lookahead, scores.shape[-1]))
        return Candidates(tokens, best, None, None, scores.new_empty(0))

    def completed(self, candidates: Candidates, tree: Seen) -> Candidates:
        slots, n = self.forwards.slots, len(candidates.tokens)
        length = slots.length - candidates.tokens.shape[1] + 1
        origin = slots.full_origin(length)
        visual = None if self.visual is None else replace(slots, origin=origin).visual(self.visual)[:, :n]
        self._tree = tree
        return replace(candidates, visual=visual, origin=origin[:, :n])

    def review(self, step: Step, candidates: Candidates, scores: Tensor) -> tuple[Tensor, list[int] | None]:
        """Scores after the decoders' judgement, and the tokens that each group goes back to, -1 to stay; None if all
        stay.
        """
        asked, n = None, len(scores)
        for i, (decoder, state) in enumerate(zip(self.decoders, self.states, strict=True)):
            if type(decoder).review is Decoder.review:
                continue
            layers, heads = self.reads[i].layers(self.layers), self.reads[i].heads
            attention = torch.stack([self._tree.attention[layer, heads][:n] for layer in layers]) if layers else None
            scores, back = decoder.review(self.view(step, i), replace(candidates, attention=attention), state, scores)
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

    def chosen(self, parents: Tensor | None, tokens: Tensor) -> None:
        """Note what was picked, for decoders that later go back to before it."""
        parents = torch.arange(len(tokens), device=tokens.device) if parents is None else parents
        for g, at in enumerate(self.search.texts.generated):
            mine = slice(g * self.size, (g + 1) * self.size)
            self.picks[g][at] = parents[mine], tokens[mine]

    def at(self) -> Tensor:
        """Which token of the answer comes next, long [n]."""
        return self.search.texts.rows(self.search.texts.generated)

    def goes_on(self, tree: Seen | None, candidates: Candidates | None, parents: Tensor | None, tokens: Tensor) -> bool:
        """Whether another step is needed; the one question a step that the device must answer."""
        entered = self.search.entered()
        n = len(tokens)
        flags = [self.search.running()]
        if entered is not None and self.decoders:
            flags.append((entered != torch.arange(n, 2 * n, device=entered.device)).any())
        if tree is not None and candidates is not None:
            match = (candidates.tokens if parents is None else candidates.tokens[parents]) == tokens[:, None]
            self._choice = match.long().argmax(1)
            flags.append((match.any(1) | ~self.search.alive).all())
        known = torch.stack(flags).tolist()
        if entered is not None and self.decoders and known[1]:
            self._finish_states(entered)
        self._inside = tree is not None and known[-1]
        return known[0]

    def _finish_states(self, rows: Tensor) -> None:
        """Keep the states of rows that end beside those of rows that ended before: rows >= n stand for the latter."""
        n = len(rows)

        def pick(new: Tensor, old: Tensor) -> Tensor:
            shape = [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:], strict=True)]
            return torch.cat([fit(new, [n, *shape]), fit(old, [n, *shape])])[rows.to(new.device)]

        self.finished = [each(now, pick, ended) for now, ended in zip(self.states, self.finished, strict=True)]

    def move(self, parents: Tensor | None, expand: bool = False, tree: bool = False) -> None:
        """Row i becomes row `parents[i]`, in the cache (candidates are still in it with a tree), in what was seen and
        in every state.
        """
        if parents is None:
            return
        count = len(self.seen.logits) // (len(self.forwards.branches) + 1)
        if expand and len(parents) == count:
            return
        self.states = [index(s, parents, count, d.name) for d, s in zip(self.decoders, self.states, strict=True)]
        self.watchers = [
            [index(s, parents, count, d.name) for d, s in zip(self.decoders, w, strict=False)] for w in self.watchers
        ]
        if not tree:
            if not expand:
                self.forwards.reorder(parents)
            every = self.forwards.every(parents, count)
            self.look(replace(self.seen.map(lambda x: x[every]), output=self.seen.output))

    def forward(
        self, tree: Seen | None, candidates: Candidates | None, parents: Tensor | None, tokens: Tensor, at: Tensor
    ) -> None:
        """Run the tokens picked, or take over what their candidates showed."""
        self.again = False
        if tree is None:
            self.look(self.forwards.next(tokens, at))
        else:
            rows = torch.arange(len(tokens), device=tokens.device) if parents is None else parents
            if self._inside:
                self.look(self.forwards.pick(tree, rows, self._choice))
            else:
                self.forwards.unpick(tree.logits.shape[1])
                self.forwards.reorder(rows)
                self.attend()
                self.look(self.forwards.next(tokens, at))
        if self.returns:
            self.forwards.write(at, max(self.search.texts.generated) - 1)

    # going back

    def remember(self) -> None:
        """Keep everything as it is before a choice."""
        new = [g for g, at in enumerate(self.search.texts.generated) if at not in self.nodes[g]]
        if not new:
            return
        names = [d.name for d in self.decoders]
        states = [Saved(s, who) for s, who in zip(self.states, names, strict=True)]
        watchers = [[Saved(s, who) for s, who in zip(w, names, strict=False)] for w in self.watchers]
        finished = [Saved(s, who) for s, who in zip(self.finished, names, strict=True)]
        node = _Node(states, watchers, finished, self.search.save(), self.forwards.save())
        for g in new:
            self.nodes[g][self.search.texts.generated[g]] = node

    def go_back(self, targets: list[int]) -> None:
        """Each group returns to where it had generated `targets[g]` tokens; -1 to where it is, before this step."""
        generated = self.search.texts.generated
        nodes = [self.nodes[g][t if t > 0 else generated[g]] for g, t in enumerate(targets)]
        rows = lambda flags: torch.tensor(flags, device=self.seen.logits.device).repeat_interleave(self.size)  # noqa: E731
        for node in {id(node): node for node in nodes}.values():
            flags = [node is one for one in nodes]
            mine = None if all(flags) else rows(flags)
            self.states = [saved.back(now, mine) for saved, now in zip(node.states, self.states, strict=True)]
            self.watchers = [
                [saved.back(now, mine) for saved, now in zip(*pair, strict=True)]
                for pair in zip(node.watchers, self.watchers, strict=True)
            ]
            self.finished = [saved.back(now, mine) for saved, now in zip(node.finished, self.finished, strict=True)]
        self.search.restore([node.search for node in nodes])
        self.forwards.restore([node.slots for node in nodes], self.size)
        picks = [self.picks[g].get(t) for g, t in enumerate(targets)]
        none = torch.full((self.size,), -1, device=self.seen.logits.device)
        parents, tokens = (torch.cat([none if pick is None else pick[i] for pick in picks]) for i in (0, 1))
        back = Rollback(rows([t > 0 for t in targets]), rows(targets), parents, tokens)
        for g, t in enumerate(targets):
            if t > 0:
                self.nodes[g] = {at: node for at, node in self.nodes[g].items() if at <= t}
        for decoder, state in zip(self.decoders, self.states, strict=True):
            decoder.rolled_back(state, back)
        self.outputs.cut(max(self.search.texts.generated))
        texts = self.search.texts
        self.attend()
        self.look(self.forwards.again(texts.last(), texts.rows([g - 1 for g in texts.generated])))

    def finish(self):
        """What `generate` returns; `states` are then those of the rows returned."""
        ids, more = self.search.result()
        if self.size > 1:
            count = self.config.num_return_sequences
            rows = torch.arange(len(self.search.alive), device=ids.device).view(-1, self.size)[:, :count].flatten()
            ended = self.states if self.search.entered() is None else self.finished
            self.states = [
                index(s, rows, len(self.search.alive), d.name) for d, s in zip(self.decoders, ended, strict=True)
            ]
        if self.decoders:
            self.forwards.seal()
        return self.outputs.result(ids, self.forwards.cache, more) if self.config.return_dict_in_generate else ids


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
