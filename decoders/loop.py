"""The decoding loop: transformers prepares a generation and hands it over, the decoders of a stack act in it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .attention import reading
from .beams import BeamSearch
from .errors import StackError
from .forwards import Forwards, Seen, watching
from .interface import Branch, Candidates, Decoder, Reads, Rollback, Run, Step
from .prepare import Prepared, one_an_image, prepared
from .search import RowSearch, Texts
from .state import Saved, each, fit, index

_PLACEHOLDERS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}


@dataclass(frozen=True)
class _Request:
    """What only the front door knows: transformers drops these on the way to a custom generation function."""

    config: Any = None
    input_ids: Tensor | None = None
    streamer: Any = None
    seeds: tuple[int, ...] | None = None
    call: tuple | None = None  # model, positional and keyword arguments of generate


class Stack:
    """Decoders that act together in one generation, in this order. `Stack([])` is plain decoding.

    Args:
        decoders: instances of `Decoder`.
        visual_mask: bool [b, prompt], true at visual tokens; overrides their detection by the model's image-token id, for
            text-only models and `inputs_embeds`.

    After a generation `record` holds what each decoder tells about it, by the decoder's name.

    Example:
        >>> stack = Stack([MyDecoder()])
        >>> ids = stack.generate(model, **inputs, max_new_tokens=512)
    """

    def __init__(self, decoders: Sequence[Decoder] = (), visual_mask: Tensor | None = None):
        if isinstance(decoders, Decoder):
            raise StackError(f"a stack takes a list of decoders: Stack([{type(decoders).__name__}(...)])")
        for decoder in decoders:
            if not isinstance(decoder, Decoder):
                raise StackError(f"{decoder!r} is no decoder; a stack takes instances of subclasses of decoders.Decoder")
        if visual_mask is not None and (visual_mask.ndim != 2 or visual_mask.dtype != torch.bool):
            raise StackError(f"visual_mask must be bool [b, prompt], not {visual_mask.dtype} {tuple(visual_mask.shape)}")
        self.decoders = list(decoders)
        self.visual_mask = visual_mask
        self.record: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Stack({self.decoders!r})"

    def generate(self, model, *args, streamer=None, seeds: Sequence[int] | None = None, tokenizer=None, **kwargs):
        """`model.generate`, decoded by this stack; takes and returns what `model.generate` does.

        Args:
            model: any generative vision-language model of transformers.
            streamer: as in transformers.
            seeds: one integer an image, for decoders with noise of their own; 0 for all by default.
            tokenizer: needed for `stop_strings`, as in transformers.

        Raises:
            StackError: if the request cannot be decoded by this stack; the message says why.
        """
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        stop_strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
        if stop_strings is not None:
            if tokenizer is None:
                raise StackError("stop_strings need the tokenizer: stack.generate(..., stop_strings=..., tokenizer=tokenizer)")
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), StopStringCriteria(tokenizer, stop_strings)])
            if config is not None and config.stop_strings is not None:
                kwargs["generation_config"] = copy.deepcopy(config)
                kwargs["generation_config"].stop_strings = None
        if kwargs.get("assistant_model") is not None:
            raise StackError("assistant models draft tokens outside this loop; leave assistant_model out")
        ids = kwargs.get("input_ids", args[0] if args else None)
        request = _Request(model.config, ids, streamer, None if seeds is None else tuple(seeds), (model, args, dict(kwargs)))
        return model.generate(*args, custom_generate=functools.partial(self._decode, request=request), **kwargs)

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """The loop as a `custom_generate` function: `model.generate(**inputs, custom_generate=stack)`."""
        return self._decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    @torch.no_grad()
    def _decode(self, model, input_ids, logits_processor, stopping_criteria, generation_config, request=_Request(), **kwargs):
        reads = [decoder.reads(model) for decoder in self.decoders]
        _check(model, generation_config, kwargs, logits_processor, request, self.decoders, reads, len(input_ids))
        times = max(generation_config.num_beams, generation_config.num_return_sequences)
        full = Prepared(model, input_ids, kwargs, generation_config)
        ordinary = Forwards.takes(full, bool(self.decoders))
        config = request.config or model.config
        given = one_an_image(full, times, {name: _first(config, names) for name, names in _PLACEHOLDERS.items()}) if ordinary else full
        branches = self._branches(request, reads, given)
        text = model.config.get_text_config(decoder=True)
        wanted: dict[int, set[str]] = {}
        for each in reads:
            for layer in each.layers(text.num_hidden_layers):
                wanted.setdefault(layer, set()).add(each.heads)
        with ExitStack() as around:
            for decoder in self.decoders:
                around.enter_context(decoder.within(model))
            tap = around.enter_context(reading(text, wanted, any(r.lookahead for r in reads)))
            hidden = around.enter_context(watching(model, {i for r in reads for i in r.hidden}, tap))
            forwards = Forwards(given, branches, tap, hidden, bool(self.decoders))
            visual = self._visual(model, given, request, reads, forwards.prompt)
            generation = _Generation(self.decoders, reads, forwards, visual, full, given, times, request, text.num_hidden_layers, logits_processor, stopping_criteria)
            result = generation.run()
        names = [d.name for d in self.decoders]
        self.record = {
            name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}": decoder.record(state)
            for i, (name, decoder, state) in enumerate(zip(names, self.decoders, generation.states))
        }
        return result

    def _branches(self, request: _Request, reads: list[Reads], given: Prepared) -> list[Prepared]:
        """What each branch prefills, in the order of the decoders that have one."""
        out = []
        for decoder, each in zip(self.decoders, reads):
            if each.branch is None:
                continue
            if request.call is None:
                raise StackError(f"{decoder.name} runs the model on other inputs, which only stack.generate(model, **inputs, ...) can prepare; call that in place of model.generate")
            model, args, kwargs = request.call
            b = len(given.input_ids)
            inputs = {**dict(zip(("input_ids",), args)), **kwargs}
            changed = each.branch.inputs({k: v for k, v in inputs.items() if isinstance(v, Tensor)}, _per_row(request.seeds, b))
            out.append(prepared(model, (), {**inputs, **changed}))
            if len(out[-1].input_ids) != b:
                raise StackError(f"{decoder.name}: the branch has {len(out[-1].input_ids)} rows, the prompts are {b}")
        return out

    def _visual(self, model, given: Prepared, request: _Request, reads: list[Reads], prompt: int) -> Tensor | None:
        """bool [b, prompt], or None when nobody asks."""
        if not any(r.visual for r in reads):
            return None
        who = ", ".join(d.name for d, r in zip(self.decoders, reads) if r.visual)
        rows = len(given.input_ids)
        if self.visual_mask is not None:
            mask = self.visual_mask
        else:
            ids = request.input_ids if request.input_ids is not None else given.input_ids
            config = request.config or model.config
            tokens = [t for names in _PLACEHOLDERS.values() for name in names if (t := getattr(config, name, None)) is not None]
            if not tokens:
                raise StackError(
                    f"{who}: {type(model).__name__} has no image-token id, so its visual tokens cannot be found. Call stack.generate(model, ...) with the "
                    "vision-language model itself, or give their places: Stack([...], visual_mask=mask)."
                )
            if ids.shape[1] == 0:
                raise StackError(f"{who}: visual tokens cannot be found in inputs_embeds; pass input_ids as well, or Stack([...], visual_mask=mask)")
            mask = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        if mask.shape[1] != given.prompt or rows % len(mask):
            raise StackError(f"{who}: the visual mask is {tuple(mask.shape)}, the prompt {rows} rows of {given.prompt} tokens")
        mask = mask.to(given.input_ids.device).repeat_interleave(rows // len(mask), 0)
        if not mask.any(-1).all():
            raise StackError(f"{who}: prompt {int((~mask.any(-1)).nonzero()[0])} holds no visual tokens. Put the image into the prompt (the processor's <image> token), or leave out {who}.")
        return torch.cat([mask.new_zeros(rows, prompt - mask.shape[1]), mask], 1)


@dataclass
class _Node:
    """Everything as it was when rows stood before a choice."""

    states: list[Saved]
    watchers: list[list[Saved]]
    finished: list[Saved]
    search: Any
    slots: tuple


class _Generation:
    """One run of the loop."""

    def __init__(self, decoders, reads, forwards: Forwards, visual, full: Prepared, given: Prepared, times: int, request: _Request, layers: int, processors, criteria):
        self.decoders, self.reads, self.forwards, self.config = decoders, reads, forwards, full.config
        self.layers, self.processors, self.criteria, self.request, self.given = layers, processors, criteria, request, given
        self.visual = visual if visual is None else visual.repeat(len(forwards.branches) + 1, 1)
        self.full, self.times = full, times
        self.b = len(given.input_ids)
        self.lookahead = max((r.lookahead for r in reads), default=0)
        self.returns = any(r.rollback for r in reads)
        self.branch_of: list[int | None] = []
        for each in reads:
            self.branch_of.append(None if each.branch is None else sum(i is not None for i in self.branch_of))
        self.ways: list[Branch] = [r.branch for r in reads if r.branch is not None]
        self.seeds = _per_row(request.seeds, self.b)
        self.size = 1  # rows an image, as long as only the prompt has run
        self.streamer = request.streamer

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
                tree = self.forwards.tree(candidates.tokens, self.at())
                candidates = self.completed(candidates, tree)
            scores = self.search.scale(scores)
            if tree is not None:
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
        eos = () if config._eos_token_tensor is None else tuple(config._eos_token_tensor.tolist())
        pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
        runs = []
        for i in range(len(forwards.branches) + 1):
            visual = None if self.visual is None else self.visual[i * self.b : (i + 1) * self.b]
            runs.append(Run(forwards.model, self.b, self.layers, visual, self.seeds, full.input_ids.device, forwards.prompt, self.given.input_ids, config, eos))
        self.states = [decoder.start(runs[0]) for decoder in self.decoders]
        self.watchers = [[d.start(run) for d in self.decoders] if way.prunes == "own" else [] for way, run in zip(self.ways, runs[1:])]
        self.again, start, n = False, full.input_ids.shape[1], len(full.input_ids)
        self.search = RowSearch(config, self.criteria, Texts(self.given.input_ids, [start] * self.b, start, 1, pad or 0))
        if self.observe(self.step(), first=True):
            self.look(forwards.again(forwards.last_prompt_tokens(), torch.full((self.b,), -1, device=full.input_ids.device)))
            self.again = True
        rows = torch.arange(self.b, device=full.input_ids.device).repeat_interleave(n // self.b)
        forwards.expand(rows, tape=self.returns)
        self.move(rows, expand=True)
        if self.visual is not None:
            self.visual = self.visual[forwards.every(rows, self.b)]
        if config.num_beams > 1:
            self.size = config.num_beams
            texts = Texts(full.input_ids, [start] * (n // self.size), start, self.size, -1 if not eos else pad or eos[0])
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
            raise StackError(f"{found[0][0].name} and {found[1][0].name} both replace the bookkeeping of finished beams, which only one can; leave one out")
        return found[0][1] if found else None

    # what the decoders see

    def look(self, seen: Seen) -> None:
        """Make `seen` what the decoders see."""
        self.seen, self._parts = seen, {}

    def _part(self, name: str, i: int, branch: int):
        """What decoder i reads of the rows of a branch (0: the main rows); made once a forward."""
        if (name, i, branch) not in self._parts:
            n = len(self.seen.logits) // (len(self.forwards.branches) + 1)
            rows = slice(branch * n, (branch + 1) * n)
            if name == "attention":
                layers, heads = self.reads[i].layers(self.layers), self.reads[i].heads
                value = torch.stack([self.seen.attention[layer, heads][rows] for layer in layers]) if layers else None
            elif name == "hidden":
                value = torch.stack([self.seen.hidden[k][rows] for k in self.reads[i].hidden]) if self.reads[i].hidden else None
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
        return Step(number, max(numbers), logits, None, None, None, None, origin, self.search.alive, self.again, texts.ids, self.size)

    def view(self, step: Step, i: int, branch: int = 0) -> Step:
        """The step as decoder i sees it."""
        parts = {name: self._part(name, i if name != "visual" else -1, branch) for name in ("attention", "hidden", "visual")}
        return replace(step, **parts, branch=self._part("branch", i, 0) if branch == 0 else None)

    # the events of a step

    def score(self, step: Step) -> Tensor:
        scores = step.logits
        for i, (decoder, state) in enumerate(zip(self.decoders, self.states)):
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
            raise StackError("the prompt of a branch differs in its tokens from the main one, so what is pruned there cannot be copied; let the branch prune for itself (prunes='own')")

    def candidates(self, scores: Tensor) -> Candidates:
        best, tokens = scores.topk(min(self.lookahead, scores.shape[-1]))
        return Candidates(tokens, best, None, None, scores.new_empty(0))

    def completed(self, candidates: Candidates, tree: Seen) -> Candidates:
        slots, n = self.forwards.slots, len(candidates.tokens)
        length = self.forwards.cache.get_seq_length() - candidates.tokens.shape[1] + 1
        origin = slots.full_origin(length)
        visual = None if self.visual is None else replace(slots, origin=origin).visual(self.visual)[:, :n]
        self._tree = tree
        return replace(candidates, visual=visual, origin=origin[:, :n])

    def review(self, step: Step, candidates: Candidates, scores: Tensor) -> tuple[Tensor, list[int] | None]:
        """Scores after the decoders' judgement, and the tokens that each group goes back to, -1 to stay; None if all stay."""
        asked, n = None, len(scores)
        for i, (decoder, state) in enumerate(zip(self.decoders, self.states)):
            if type(decoder).review is Decoder.review:
                continue
            layers, heads = self.reads[i].layers(self.layers), self.reads[i].heads
            attention = torch.stack([self._tree.attention[layer, heads][:n] for layer in layers]) if layers else None
            scores, back = decoder.review(self.view(step, i), replace(candidates, attention=attention), state, scores)
            if back is not None:
                far = torch.iinfo(back.dtype).max
                back = back.masked_fill(back < 0, far)
                asked = back if asked is None else torch.minimum(asked, back)
        if asked is None:
            return scores, None
        targets = asked.view(-1, self.size).amin(1).tolist()
        generated = self.search.texts.generated
        targets = [t if t <= g else -1 for t, g in zip(targets, generated)]
        if any(t == 0 for t in targets):
            raise StackError("a decoder asked to go back to before the first token, which comes from the prompt; the least is 1")
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
        if tree is not None:
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
            shape = [max(a, b) for a, b in zip(new.shape[1:], old.shape[1:])]
            return torch.cat([fit(new, [n, *shape]), fit(old, [n, *shape])])[rows.to(new.device)]

        self.finished = [each(now, pick, ended) for now, ended in zip(self.states, self.finished)]

    def move(self, parents: Tensor | None, expand: bool = False, tree: bool = False) -> None:
        """Row i becomes row `parents[i]`, in the cache (candidates are still in it with a tree), in what was seen and in every state."""
        if parents is None:
            return
        count = len(self.seen.logits) // (len(self.forwards.branches) + 1)
        if expand and len(parents) == count:
            return
        self.states = [index(s, parents, count, d.name) for d, s in zip(self.decoders, self.states)]
        self.watchers = [[index(s, parents, count, d.name) for d, s in zip(self.decoders, w)] for w in self.watchers]
        if not tree:
            if not expand:
                self.forwards.reorder(parents)
            every = self.forwards.every(parents, count)
            self.look(replace(self.seen.map(lambda x: x[every]), output=self.seen.output))

    def forward(self, tree: Seen | None, candidates: Candidates | None, parents: Tensor | None, tokens: Tensor, at: Tensor) -> None:
        """Run the tokens picked, or take over what their candidates showed."""
        self.again = False
        if tree is None:
            self.look(self.forwards.next(tokens, at))
        else:
            rows = torch.arange(len(tokens), device=tokens.device) if parents is None else parents
            if self._inside:
                self.look(self.forwards.pick(tree, rows, self._choice))
            else:
                self.forwards.unpick(candidates.tokens.shape[1])
                self.forwards.reorder(rows)
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
        states = [Saved(s, who) for s, who in zip(self.states, names)]
        watchers = [[Saved(s, who) for s, who in zip(w, names)] for w in self.watchers]
        finished = [Saved(s, who) for s, who in zip(self.finished, names)]
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
            self.states = [saved.back(now, mine) for saved, now in zip(node.states, self.states)]
            self.watchers = [[saved.back(now, mine) for saved, now in zip(*pair)] for pair in zip(node.watchers, self.watchers)]
            self.finished = [saved.back(now, mine) for saved, now in zip(node.finished, self.finished)]
        self.search.restore([node.search for node in nodes])
        self.forwards.restore([node.slots for node in nodes], self.size)
        picks = [self.picks[g].get(t) for g, t in enumerate(targets)]
        none = torch.full((self.size,), -1, device=self.seen.logits.device)
        parents, tokens = (torch.cat([none if pick is None else pick[i] for pick in picks]) for i in (0, 1))
        back = Rollback(rows([t > 0 for t in targets]), rows(targets), parents, tokens)
        for g, t in enumerate(targets):
            if t > 0:
                self.nodes[g] = {at: node for at, node in self.nodes[g].items() if at <= t}
        for decoder, state in zip(self.decoders, self.states):
            decoder.rolled_back(state, back)
        self.outputs.cut(max(self.search.texts.generated))
        texts = self.search.texts
        self.look(self.forwards.again(texts.last(), texts.rows([g - 1 for g in texts.generated])))

    def finish(self):
        """What `generate` returns; `states` are then those of the rows returned."""
        ids, more = self.search.result()
        if self.size > 1:
            count = self.config.num_return_sequences
            rows = torch.arange(len(self.search.alive), device=ids.device).view(-1, self.size)[:, :count].flatten()
            ended = self.states if self.search.entered() is None else self.finished
            self.states = [index(s, rows, len(self.search.alive), d.name) for d, s in zip(self.decoders, ended)]
        return self.outputs.result(ids, self.forwards.cache, more) if self.config.return_dict_in_generate else ids


class _Outputs:
    """What `return_dict_in_generate` collects, by token of the answer."""

    def __init__(self, config, rows: int, first: Tensor):
        self.config, self.rows, self.first = config, rows, first
        asked = config.return_dict_in_generate
        self.kept = {name: [] for name in ("scores", "logits", "attentions", "hidden_states") if asked and getattr(config, f"output_{name}")}

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

    def result(self, ids: Tensor, cache: Cache, more: dict):
        values = {name: tuple(values) for name, values in self.kept.items()}
        if not more:
            return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache, **values)
        if "scores" not in values:
            more = {**more, "sequences_scores": None}
        return GenerateBeamDecoderOnlyOutput(sequences=ids, past_key_values=cache, **values, **more)


def _check(model, config, kwargs: dict, processors, request: _Request, decoders, reads: list[Reads], rows: int) -> None:
    """Refuse what this loop does not decode, by name."""
    modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
    if model.config.is_encoder_decoder:
        raise StackError(f"{type(model).__name__} is an encoder-decoder model; the loop decodes decoder-only models")
    if config.get_generation_mode() not in modes:
        raise StackError(f"generation mode '{config.get_generation_mode().value}' is not decoded by this loop, which decodes greedily, by sampling and by beam search")
    if not config.use_cache or not kwargs.get("use_cache", True):
        raise StackError("the loop needs the key-value cache; leave use_cache=True")
    if config.prefill_chunk_size is not None:
        raise StackError("chunked prefill is not supported; leave prefill_chunk_size=None")
    if config.low_memory:
        raise StackError("low_memory beam search is not supported, as in transformers; leave low_memory out")
    if request.streamer is not None and config.num_beams > 1:
        raise StackError("a streamer cannot show beam search, in which earlier words still change; leave streamer out or set num_beams=1")
    returning = [d.name for d, r in zip(decoders, reads) if r.rollback]
    if request.streamer is not None and returning:
        raise StackError(f"{returning[0]} may take words back, which a streamer cannot; leave streamer out")
    if returning and rows > config.num_beams and any(isinstance(p, PrefixConstrainedLogitsProcessor) for p in processors):
        raise StackError(f"prefix_allowed_tokens_fn counts on all images being equally long, which {returning[0]} does not keep; pass one image at a time")
    ahead = [d.name for d, r in zip(decoders, reads) if r.lookahead]
    if ahead and (config.output_attentions or config.output_hidden_states) and config.return_dict_in_generate:
        raise StackError(f"{ahead[0]} runs candidates in a tree, of which output_attentions and output_hidden_states would show the wrong ones; leave them out")


def _first(config, names: Sequence[str]) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _per_row(seeds: tuple[int, ...] | None, rows: int) -> list[int]:
    if seeds is None:
        return [0] * rows
    if rows % len(seeds):
        raise StackError(f"{len(seeds)} seeds for {rows} rows; give one an image")
    return [seed for seed in seeds for _ in range(rows // len(seeds))]
