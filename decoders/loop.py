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
from transformers.generation.configuration_utils import GenerationMode
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .attention import reading
from .cache import SlotLayer, Slots
from .errors import StackError
from .interface import Decoder, Reads, Run, Step


@dataclass(frozen=True)
class _Request:
    """What only the front door knows: transformers drops these on the way to a custom generation function."""

    config: Any = None
    input_ids: Tensor | None = None
    streamer: Any = None
    seeds: tuple[int, ...] | None = None


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
        request = _Request(model.config, ids, streamer, None if seeds is None else tuple(seeds))
        return model.generate(*args, custom_generate=functools.partial(self._decode, request=request), **kwargs)

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """The loop as a `custom_generate` function: `model.generate(**inputs, custom_generate=stack)`."""
        return self._decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    @torch.no_grad()
    def _decode(self, model, input_ids, logits_processor, stopping_criteria, generation_config, request=_Request(), **kwargs):
        _check(model, generation_config, kwargs)
        reads = [decoder.reads(model) for decoder in self.decoders]
        prompt = input_ids.shape[1] or kwargs["inputs_embeds"].shape[1]
        rows = len(input_ids)
        visual = self._visual(model, input_ids, request, reads, rows, prompt)
        text = model.config.get_text_config(decoder=True)
        wanted = [r.layers(text.num_hidden_layers) for r in reads]
        layers = sorted({i for each in wanted for i in each})
        seeds = _per_row(request.seeds, rows)
        run = Run(model, rows, text.num_hidden_layers, visual, seeds, input_ids.device)
        with ExitStack() as around:
            for decoder in self.decoders:
                around.enter_context(decoder.within(model))
            attention = around.enter_context(reading(text, tuple(layers)))
            if request.streamer is not None:
                request.streamer.put(input_ids.cpu())
            forwards = _Forwards(model, kwargs, input_ids, attention, visual, strict=bool(self.decoders))
            forwards.wanted = [[layers.index(i) for i in each] for each in wanted]
            states = [decoder.start(run) for decoder in self.decoders]
            result = self._loop(forwards, states, input_ids, logits_processor, stopping_criteria, generation_config, request.streamer)
        names = [d.name for d in self.decoders]
        self.record = {
            name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}": decoder.record(state)
            for i, (name, decoder, state) in enumerate(zip(names, self.decoders, states))
        }
        return result

    def _loop(self, forwards: _Forwards, states, input_ids, logits_processor, stopping_criteria, config, streamer):
        """Greedy decoding and sampling, in transformers' order of events."""
        pad = None if config._pad_token_tensor is None else config._pad_token_tensor.to(input_ids.device)
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        keep = _Outputs(config)
        alive = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        out = forwards.prefill(config)
        step = forwards.step(1, alive, input_ids)
        if self._observe(forwards, states, step, again=True):
            out = forwards.last_prompt_token_again()
            step = forwards.step(1, alive, input_ids, again=True)
        while True:
            logits = out.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            scores = logits
            for decoder, state, view in zip(self.decoders, states, forwards.views(step)):
                scores = decoder.score(view, state, scores)
            scores = logits_processor(input_ids, scores)
            keep.add(out, logits, scores)
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if has_eos:
                tokens = torch.where(alive, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            alive = alive & ~stopping_criteria(input_ids, keep.scores)
            if not alive.any():
                break
            step.alive, step.input_ids = alive, input_ids
            self._observe(forwards, states, step)
            out = forwards.next(input_ids)
            step = forwards.step(step.number + 1, alive, input_ids)
        if streamer is not None:
            streamer.end()
        return keep.result(input_ids, forwards.cache) if config.return_dict_in_generate else input_ids

    def _observe(self, forwards: _Forwards, states, step: Step, again: bool = False) -> bool:
        """Ask the decoders what to keep and intersect their answers. With `again`, ask only about the first token."""
        slots, repeat = None, False
        for decoder, state, view in zip(self.decoders, states, forwards.views(step)):
            hook = decoder.before_first_token if again else decoder.observe
            kept = hook(view, state)
            if kept is not None:
                slots = kept if slots is None else slots & kept
                repeat = again
        if slots is not None:
            forwards.keep(slots)
        return repeat

    def _visual(self, model, input_ids: Tensor, request: _Request, reads: list[Reads], rows: int, prompt: int) -> Tensor | None:
        """bool [n, prompt], or None when nobody asks."""
        if not any(r.visual for r in reads):
            return None
        who = ", ".join(d.name for d, r in zip(self.decoders, reads) if r.visual)
        if self.visual_mask is not None:
            mask = self.visual_mask
        else:
            ids = request.input_ids if request.input_ids is not None else input_ids
            config = request.config or model.config
            tokens = [t for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index") if (t := getattr(config, name, None)) is not None]
            if not tokens:
                raise StackError(
                    f"{who}: {type(model).__name__} has no image-token id, so its visual tokens cannot be found. Call stack.generate(model, ...) with the "
                    "vision-language model itself, or give their places: Stack([...], visual_mask=mask)."
                )
            if ids.shape[1] == 0:
                raise StackError(f"{who}: visual tokens cannot be found in inputs_embeds; pass input_ids as well, or Stack([...], visual_mask=mask)")
            mask = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        if mask.shape[1] != prompt or rows % len(mask):
            raise StackError(f"{who}: the visual mask is {tuple(mask.shape)}, the prompt {rows} rows of {prompt} tokens")
        mask = mask.to(input_ids.device).repeat_interleave(rows // len(mask), 0)
        if not mask.any(-1).all():
            raise StackError(f"{who}: prompt {int((~mask.any(-1)).nonzero()[0])} holds no visual tokens. Put the image into the prompt (the processor's <image> token), or leave out {who}.")
        return mask


class _Forwards:
    """The model's forwards on one cache, and the books about its slots."""

    def __init__(self, model, kwargs: dict, input_ids: Tensor, attention: dict, visual: Tensor | None, strict: bool):
        self.model, self.kwargs, self.input_ids, self.attention, self.visual_prompt = model, kwargs, input_ids, attention, visual
        given = kwargs.get("past_key_values")
        if given is not None and given.get_seq_length():
            raise StackError("continuing from a filled cache is not supported: pass the whole conversation, without past_key_values")
        ordinary = isinstance(given, DynamicCache) and given.layers and not given.offloading and not getattr(given, "_is_user_defined", False)
        plain = bool(ordinary) and all(type(layer) is DynamicLayer for layer in given.layers)
        if plain:
            self.cache: Cache = Cache(layer_class_to_replicate=SlotLayer)
        elif strict:
            kinds = sorted({type(layer).__name__ for layer in given.layers}) if given is not None else ["no cache"]
            kinds = ["an offloaded cache"] if given is not None and given.offloading else kinds or ["a cache of the caller's own"]
            raise StackError(f"a stack with decoders needs a full-attention cache in every layer; {type(model).__name__} here has {', '.join(kinds)} (sliding-window, linear-attention, static, offloaded and user-made caches are refused)")
        else:
            self.cache = given
        self.ours = plain
        self.kwargs["past_key_values"] = self.cache
        prompt = input_ids.shape[1] or kwargs["inputs_embeds"].shape[1]
        self.slots = Slots(len(input_ids), prompt, kwargs.get("attention_mask"), input_ids.device)
        self.visual = None if visual is None else self.slots.visual(visual)

    def prefill(self, config):
        out = self.model._prefill(self.input_ids, config, self.kwargs)
        self._advance(out)
        return out

    def last_prompt_token_again(self):
        """Take the last prompt token's slots away and run it again against what is left of the cache."""
        self.slots.crop(self.cache)
        self._books()
        positions = self.kwargs.get("position_ids")  # already those of the next token
        kwargs = {**self.kwargs, "position_ids": None if positions is None else positions - 1, "attention_mask": self.slots.mask(self.cache.get_seq_length() + 1)}
        embeds = self.input_ids.shape[1] == 0
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, next_sequence_length=1, is_first_iteration=embeds, **kwargs)
        return self.model(**inputs, return_dict=True)

    def next(self, input_ids: Tensor):
        """One token a row."""
        if self.ours:
            self.kwargs["attention_mask"] = self.slots.mask(self.cache.get_seq_length() + 1)
        inputs = self.model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.kwargs)
        out = self.model(**inputs, return_dict=True)
        self._advance(out)
        return out

    def _advance(self, out) -> None:
        if self.ours:
            self.kwargs["attention_mask"] = None  # made from the slots, before each forward
        self.kwargs = self.model._update_model_kwargs_for_generation(out, self.kwargs, is_encoder_decoder=False)
        for name in ("position_ids", "mm_token_type_ids", "token_type_ids"):  # the newest is all that is used
            if self.kwargs.get(name) is not None:
                self.kwargs[name] = self.kwargs[name][..., -1:]

    def keep(self, slots: Tensor) -> None:
        self.slots.keep(self.cache, slots)
        self._books()

    def _books(self) -> None:
        self.visual = None if self.visual_prompt is None else self.slots.visual(self.visual_prompt)

    def views(self, step: Step) -> list[Step]:
        """The step as each decoder sees it: with the attention rows that it reads."""
        full = 0 if step.attention is None else len(step.attention)
        return [step if len(each) == full else replace(step, attention=step.attention[each] if each else None) for each in self.wanted]

    def step(self, number: int, alive: Tensor, input_ids: Tensor, again: bool = False) -> Step:
        rows = [row for _, row in sorted(self.attention.items())]
        attention = torch.stack([row.to(input_ids.device) for row in rows]) if rows else None
        return Step(number, attention, self.visual, self.slots.origin, alive, again, input_ids)


class _Outputs:
    """What `return_dict_in_generate` collects."""

    def __init__(self, config):
        asked = config.return_dict_in_generate
        self.scores = () if asked and config.output_scores else None
        self.logits = () if asked and config.output_logits else None
        self.attentions = () if asked and config.output_attentions else None
        self.hidden_states = () if asked and config.output_hidden_states else None

    def add(self, out, logits: Tensor, scores: Tensor) -> None:
        for name, value in (("scores", scores), ("logits", logits), ("attentions", out.get("attentions")), ("hidden_states", out.get("hidden_states"))):
            if getattr(self, name) is not None:
                setattr(self, name, (*getattr(self, name), value))

    def result(self, input_ids: Tensor, cache: Cache) -> GenerateDecoderOnlyOutput:
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=self.scores, logits=self.logits, attentions=self.attentions, hidden_states=self.hidden_states, past_key_values=cache
        )


def _check(model, config, kwargs: dict) -> None:
    """Refuse what this loop does not decode, by name."""
    if model.config.is_encoder_decoder:
        raise StackError(f"{type(model).__name__} is an encoder-decoder model; the loop decodes decoder-only models")
    if config.num_beams > 1:
        raise StackError(f"num_beams={config.num_beams}: this loop decodes greedily and by sampling; set num_beams=1")
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise StackError(f"generation mode '{config.get_generation_mode().value}' is not decoded by this loop, which decodes greedily and by sampling")
    if not config.use_cache or not kwargs.get("use_cache", True):
        raise StackError("the loop needs the key-value cache; leave use_cache=True")
    if config.prefill_chunk_size is not None:
        raise StackError("chunked prefill is not supported; leave prefill_chunk_size=None")


def _per_row(seeds: tuple[int, ...] | None, rows: int) -> list[int]:
    if seeds is None:
        return [0] * rows
    if rows % len(seeds):
        raise StackError(f"{len(seeds)} seeds for {rows} rows; give one an image")
    return [seed for seed in seeds for _ in range(rows // len(seeds))]
