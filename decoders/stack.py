"""The public API: a stack checks a request, prepares it through transformers, and hands it to the loop."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import RLock, Thread, current_thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import hf
from .attention import Tap, current_tap, reading
from .cache_layers import LeftCache
from .capture import capture_hidden_states
from .compiled import check_mode, told
from .errors import StackError, in_hook
from .hooks import Hooks
from .inputs import PreparedInputs, by_name, one_an_image, prepare_inputs
from .inside import Inside, editing
from .interface import Decoder, Requirements
from .loop import Generation, seeds_by_row
from .options import check_distinct
from .raw_inputs import RawInputs
from .runner import ModelRunner
from .validation import (
    Layers,
    check_call,
    check_continuation,
    check_generation,
    check_pictures,
    check_request,
    layers,
    reason,
    refusals,
    runs_before_prefill,
    wrapped,
)

_turns: WeakKeyDictionary[Any, RLock] = (
    WeakKeyDictionary()
)  # one generation of ours at a time on a model, which decoders may edit
_turns_lock = RLock()


@dataclass(frozen=True)
class _Request:
    """What only the front door knows: transformers drops these on the way to a custom generation function."""

    config: Any = None
    input_ids: Tensor | None = None
    streamer: Any = None
    seeds: tuple[int, ...] | None = None
    call: tuple[Any, dict] | None = None  # the model that generates, and the arguments of generate
    compile: str | None = None
    tokenizer: Any = None

    def raw(self, images: int, who: str) -> RawInputs:
        """What `generate` was given, for the decoder `who`.

        Raises:
            StackError: where transformers dropped it.
        """
        if self.call is None:
            raise StackError(
                f"{who} runs the model on other inputs, which only stack.generate(model, **inputs, ...) can prepare;"
                " call that in place of model.generate"
            )
        return RawInputs(*self.call, seeds_by_row(self.seeds, images), self.tokenizer)


class Stack:
    """Decoders that act together in one generation, in this order. `Stack([])` is plain decoding.

    Args:
        decoders: instances of `Decoder`; two of a class have different options.
        visual_mask: bool [b, prompt], true at visual tokens; overrides their detection by the model's image-token id,
            for text-only models and `inputs_embeds`.
        compile: how the decode step is run. `off`: as it is; `on`: by torch.compile, the first time in every process a
            minute or so, or an error that says why not; `captured`: as it is, recorded as a CUDA graph, on a GPU;
            `auto`: on a GPU where many tokens are to come compiled, or captured where that cannot be, else as it is.

    After a generation `record` holds what each decoder tells about it, by the decoder's name, and `compiled`, where it
    was, how many graphs were made and in how many seconds. A stack may be used from several threads: each reads the
    record of its own last generation, and generations on one model take turns.

    Example:
        >>> stack = Stack([MyDecoder()])
        >>> ids = stack.generate(model, **inputs, max_new_tokens=512)
    """

    def __init__(self, decoders: Sequence[Decoder] = (), visual_mask: Tensor | None = None, compile: str = "off"):
        if isinstance(decoders, Decoder):
            raise StackError(f"a stack takes a list of decoders: Stack([{type(decoders).__name__}(...)])")
        for decoder in decoders:
            if not isinstance(decoder, Decoder):
                raise StackError(
                    f"{decoder!r} is no decoder; a stack takes instances of subclasses of decoders.Decoder"
                )
        check_distinct(decoders)
        if visual_mask is not None and (visual_mask.ndim != 2 or visual_mask.dtype != torch.bool):
            raise StackError(
                f"visual_mask must be bool [b, prompt], not {visual_mask.dtype} {tuple(visual_mask.shape)}"
            )
        self.decoders = list(decoders)
        self.visual_mask = visual_mask
        self.compile = check_mode(compile)
        self.compiled: dict[str, float] | None = None
        self._records: WeakKeyDictionary[Thread, dict[str, Any]] = WeakKeyDictionary()
        self._newest: dict[str, Any] = {}

    @property
    def record(self) -> dict[str, Any]:
        """What the decoders told of this thread's last generation; of any thread's, where this one has made none."""
        return self._records.get(current_thread(), self._newest)

    def refusals(self, model, tokens: int = 0) -> dict[str, str | None]:
        """Why each decoder of the stack cannot act on `model`, by name, None for those that can; runs nothing, so the
        model may be on the meta device.

        Args:
            tokens: the longest prompt and answer, which matter only to models whose layers all attend within a window.
        """
        return dict(
            zip(self._names(), refusals(model, self.decoders, tokens, self.visual_mask is not None), strict=True)
        )

    def _names(self) -> list[str]:
        names = [d.name for d in self.decoders]
        return [
            name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}"
            for i, name in enumerate(names)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has none of these threads."""
        return {**vars(self), "_records": None, "_newest": self.record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _records=WeakKeyDictionary())

    def __repr__(self) -> str:
        return f"Stack({self.decoders!r})"

    def generate(
        self,
        model: Any,
        *args: Any,
        streamer: Any = None,
        seeds: Sequence[int] | None = None,
        tokenizer: Any = None,
        compile: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate`, decoded by this stack; takes and returns what `model.generate` does.

        Args:
            model: any generative vision-language model of transformers.
            streamer: as in transformers.
            seeds: one integer an image, for decoders with noise of their own; 0 for all by default.
            tokenizer: needed for `stop_strings`, as in transformers, and by decoders that put text into the prompt; the
                processor does as well.
            compile: in place of the stack's own.

        Raises:
            StackError: if the request cannot be decoded by this stack; the message says why.
        """
        check_call(model, args)
        if compile is not None:
            check_mode(compile)
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        stop_strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
        if stop_strings is not None:
            if tokenizer is None:
                raise StackError(
                    "stop_strings need the tokenizer: stack.generate(..., stop_strings=..., tokenizer=tokenizer)"
                )
            kwargs["stopping_criteria"] = hf.stopping_criteria(
                [*(kwargs.get("stopping_criteria") or []), hf.stops_at(stop_strings, tokenizer)]
            )
            if config is not None and config.stop_strings is not None:
                kwargs["generation_config"] = copy.deepcopy(config)
                kwargs["generation_config"].stop_strings = None
        check_request(model, self.decoders, kwargs)
        inputs = by_name(model, args, kwargs)
        request = _Request(
            model.config,
            inputs.get("input_ids"),
            streamer,
            None if seeds is None else tuple(seeds),
            (model, inputs),
            compile,
            tokenizer,
        )
        with _turn(model), ExitStack() as around:
            for decoder in self.decoders:
                around.enter_context(decoder.encoding_context(model))
            return model.generate(*args, custom_generate=functools.partial(self._decode, request=request), **kwargs)

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """The loop as a `custom_generate` function: `model.generate(**inputs, custom_generate=stack)`."""
        return self._decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    @torch.no_grad()
    def _decode(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, request=_Request(), **kwargs
    ):
        with _turn(model):
            return self._decoded(
                model, input_ids, logits_processor, stopping_criteria, generation_config, request, kwargs
            )

    def _decoded(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, request: _Request, kwargs: dict
    ):
        config = request.config or model.config
        requirements = [decoder.requirements(model) for decoder in self.decoders]
        ids = input_ids if request.input_ids is None else request.input_ids
        expanded = PreparedInputs(model, input_ids, kwargs, generation_config, ids)
        parts = (logits_processor, request.streamer, self.decoders, requirements)
        check_generation(model, generation_config, kwargs, *parts, len(input_ids))
        kinds = self._layers(expanded, config, requirements)
        continued = isinstance(hf.cache_of(kwargs), LeftCache)
        pooled = kinds is not None and (bool(self.decoders) or kinds.ordinary or continued)
        whole = () if kinds is None else kinds.whole
        times = max(generation_config.num_beams, generation_config.num_return_sequences)
        inputs = self._once(expanded, times, config, request) if pooled else expanded
        if isinstance(left := hf.cache_of(kwargs), LeftCache) and pooled:
            placeholders = list(hf.placeholder_ids(config).values())
            check_continuation(left, inputs.input_ids, placeholders, any(r.branch for r in requirements))
            check_pictures(self.decoders, requirements)
        branches = self._branches(request, requirements, inputs)
        seeds = seeds_by_row(request.seeds, len(inputs.input_ids))
        tap = self._tap(inputs.model, requirements, whole, seeds)
        self._before_prefill(request, requirements, len(inputs.input_ids), tap)
        shown = generation_config.return_dict_in_generate and (
            generation_config.output_attentions or generation_config.output_hidden_states
        )
        with ExitStack() as around:
            for decoder in self.decoders:
                around.enter_context(decoder.model_context(model))
            if pooled:
                around.enter_context(reading(model, tap))
            around.enter_context(editing(model, tap.inside, current_tap))
            around.enter_context(capture_hidden_states(model, set().union(*(r.hidden_states for r in requirements))))
            alone = bool(shown) or (kinds is not None and bool(kinds.recurrent))
            runner = ModelRunner(inputs, branches, tap, pooled, whole, alone)
            generation = Generation(
                hooks=Hooks(self.decoders, requirements, runner),
                inputs=inputs,
                expanded=expanded,
                visual=self._visual([inputs, *branches], config, requirements, runner.prompt),
                seeds=seeds,
                processors=logits_processor,
                criteria=stopping_criteria,
                streamer=request.streamer,
                compile=self.compile if request.compile is None else request.compile,
            )
            result = generation.run()
        self.compiled = told(runner.compiled)
        self._newest = {
            name: decoder.record(state)
            for name, decoder, state in zip(self._names(), self.decoders, generation.states.main, strict=True)
        }
        self._records[current_thread()] = self._newest
        return result

    def _layers(self, expanded: PreparedInputs, config, requirements: list[Requirements]) -> Layers | None:
        """The model's layers, or an error that says what is in the way. None for the empty stack where only the cache
        that transformers prepared will do.
        """
        reach = (
            expanded.prompt + expanded.config.max_length - expanded.input_ids.shape[1]
        )  # which counts ids only, and inputs_embeds has none
        cache = hf.cache_of(expanded.kwargs)
        if isinstance(cache, LeftCache):  # whose layers are of the kinds that transformers would make
            cache = hf.empty_cache(expanded.model)
        kinds = (wrapped(expanded.model) if requirements else None) or layers(cache, expanded.model, reach)
        for decoder, each in zip(self.decoders, requirements, strict=True):
            why = reason(expanded.model, config, decoder, each, kinds, self.visual_mask is not None)
            if why is not None:
                raise StackError(f"{decoder.name} cannot act on {type(expanded.model).__name__}: {why}")
        return None if isinstance(kinds, str) else kinds

    def _once(self, expanded: PreparedInputs, times: int, config, request: _Request) -> PreparedInputs:
        """What is prefilled, each image once."""
        inputs = one_an_image(expanded, times, hf.placeholder_ids(config))
        if inputs is not None:
            return inputs
        if request.call is None:
            raise StackError(
                "the pictures of these prompts cannot be told apart for beams or returned sequences; call"
                " stack.generate(model, ...) in place of model.generate"
            )
        return prepare_inputs(*request.call)

    def _branches(
        self, request: _Request, requirements: list[Requirements], main: PreparedInputs
    ) -> list[PreparedInputs]:
        """What each branch prefills, in the order of the decoders that have one."""
        out, b = [], len(main.input_ids)
        for decoder, each in zip(self.decoders, requirements, strict=True):
            if each.branch is None:
                continue
            given = request.raw(b, decoder.name)
            out.append(prepare_inputs(given.model, given.with_changes(each.branch.inputs(given))))
            if len(out[-1].input_ids) != b:
                raise StackError(f"{decoder.name}: the branch has {len(out[-1].input_ids)} rows, the prompts are {b}")
        return out

    def _tap(self, model, requirements: list[Requirements], whole: tuple[int, ...], seeds: list[int]) -> Tap:
        """What the model is given and what is kept of it, for the layers that attend to the whole sequence."""
        read = [(whole[i], r.head_reduction) for r in requirements for i in r.resolve_layers(len(whole))]
        tap = Tap(frozenset(layer for layer, _ in read), reductions=frozenset(heads for _, heads in read))
        if any(r.edits for r in requirements):
            branches = list(itertools.accumulate(r.branch is not None for r in requirements))
            own = [n if r.branch is not None else None for n, r in zip(branches, requirements, strict=True)]
            pruning = [r.branch.pruning for r in requirements if r.branch is not None]
            tap.inside = Inside(self.decoders, requirements, own, whole, seeds, model, pruning)
        return tap

    def _before_prefill(self, request: _Request, requirements: list[Requirements], images: int, tap: Tap) -> None:
        """Let decoders that act inside the forward run the model on prompts before the prefill."""
        for i, (decoder, needs) in enumerate(zip(self.decoders, requirements, strict=True)):
            if tap.inside is not None and runs_before_prefill(decoder, needs):
                given = request.raw(images, decoder.name)
                with in_hook(decoder, "before_prefill"):
                    tap.inside.images[i, 0].update(decoder.before_prefill(given))

    def _visual(
        self, every: list[PreparedInputs], config, requirements: list[Requirements], prompt: int
    ) -> Tensor | None:
        """bool [m, prompt], of the main rows and of every branch's, or None when nobody asks."""
        if not any(r.visual for r in requirements):
            return None
        who = ", ".join(d.name for d, r in zip(self.decoders, requirements, strict=True) if r.visual)
        ways = ["main", *(r.branch.pruning for r in requirements if r.branch is not None)]
        masks = []
        for one, way in zip(every, ways, strict=True):
            rows = len(one.input_ids)
            mask = self._visual_of(one, config, who) if self.visual_mask is None else self.visual_mask
            if mask.shape[1] != one.prompt or rows % len(mask):
                raise StackError(
                    f"{who}: the visual mask is {tuple(mask.shape)}, the prompt {rows} rows of {one.prompt} tokens"
                )
            mask = mask.to(one.input_ids.device).repeat_interleave(rows // len(mask), 0)
            if way in ("main", "independent") and not mask.any():
                where = "prompt" if way == "main" else "prompt of a branch"
                raise StackError(
                    f"{who}: no {where} holds visual tokens. Put the image into the prompt (the processor's <image>"
                    f" token), or leave out {who}."
                )
            masks.append(torch.cat([mask.new_zeros(rows, prompt - mask.shape[1]), mask], 1))
        return torch.cat(masks)

    def _visual_of(self, one: PreparedInputs, config, who: str) -> Tensor:
        """bool [b, prompt], by the model's image-token id."""
        tokens = list(hf.placeholder_ids(config).values())
        if one.ids is None or one.ids.shape[1] == 0:
            raise StackError(
                f"{who}: visual tokens cannot be found in inputs_embeds; pass input_ids as well, or Stack([...],"
                " visual_mask=mask)"
            )
        return torch.isin(one.ids, torch.tensor(tokens, device=one.ids.device))


def _turn(model) -> RLock:
    """The model's lock: generations of one model wait for each other."""
    with _turns_lock:
        return _turns.setdefault(model, RLock())
