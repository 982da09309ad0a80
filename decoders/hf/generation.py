"""What `generate` hands to a decoding loop and takes back: forwards, inputs of a step, searches, criteria that stop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import (
    Cache,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
)

from ..versions import VERSION
from .inputs import text_tokenizer

# What the cache is called among the arguments of `generate`, of a forward, and in outputs: `past_key_values` up to
# 5.23, `cache` from 5.24 on.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
# Images that `generate` encoded before the loop begins; up to 5.17 it hands over pixels in their place.
ENCODED = "mm_encoder_outputs"
# Inputs of a decode step that have an entry a token; all others of the prefill's are about images or the prompt.
_PER_TOKEN = ("position_ids", "mm_token_type_ids", "token_type_ids")
# From 5.24 on, beam sampling sorts the continuations that it drew; before, they stand in the order of the draws.
SORTS_SAMPLED_BEAMS = Version("5.24.0") <= VERSION
SEARCHES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


# What `generate` hands to a decoding loop


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the inputs of the model, or in what it or `generate` returned."""
    return kwargs.get(CACHE)


def with_cache(kwargs: dict, cache: Cache) -> dict:
    """The inputs of the model with this cache."""
    return {**kwargs, CACHE: cache}


def eos_ids(config: GenerationConfig) -> tuple[int, ...]:
    """The ids that end a sequence; `generate` keeps them as a tensor in a private attribute of its config."""
    found = config._eos_token_tensor
    return () if found is None else tuple(found.tolist())


def pad_id(config: GenerationConfig) -> int | None:
    """The id that follows the end of a sequence, or None; kept as `eos_ids`."""
    found = config._pad_token_tensor
    return None if found is None else int(found)


def search_mode(config: GenerationConfig) -> GenerationMode:
    """How `generate` would search with this config; `SEARCHES` are those of this loop."""
    return config.get_generation_mode()


# Forwards


def prefill(model, input_ids: Tensor, config: GenerationConfig, kwargs: dict) -> tuple[Any, dict]:
    """Run the prompt through the model as `generate` does.

    Returns:
        What the model returned, and the inputs of the model for the next token.
    """
    output = model._prefill(input_ids, config, kwargs)
    return output, model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=False)


def constant_inputs(kwargs: dict) -> dict:
    """Of the inputs of the model, those that are the same at every decode step: flags, no tensors."""
    return {k: v for k, v in kwargs.items() if not isinstance(v, Tensor) and k not in (ENCODED, CACHE)}


def token_inputs(kwargs: dict) -> dict[str, Tensor]:
    """Of the inputs of the model, those of the newest token: [n, 1], or [rotary axes, n, 1]."""
    return {k: kwargs[k][..., -1:] for k in _PER_TOKEN if isinstance(kwargs.get(k), Tensor)}


def decode_inputs(model, tokens: Tensor, cache: Cache, attention_mask: Tensor | None, kwargs: dict) -> dict:
    """The arguments of a forward over the new tokens [n, q], as the model's family prepares them."""
    kwargs = {**kwargs, CACHE: cache, "attention_mask": attention_mask}
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = tokens.shape[1]
    return model.prepare_inputs_for_generation(tokens, next_sequence_length=tokens.shape[1], **kwargs)


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a block or the output embeddings get, by place or by name."""
    return args[0] if args else kwargs["hidden_states"]


def with_input(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    """The arguments of the output embeddings with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def embeddings_of(model, args: tuple, kwargs: dict) -> Tensor:
    """The embeddings [m, q, d] that the language model without its output embeddings is called with."""
    found = kwargs.get("inputs_embeds")
    return model.get_input_embeddings()(args[0] if args else kwargs["input_ids"]) if found is None else found


def with_embeddings(kwargs: dict, old: Tensor, new: Tensor) -> tuple[tuple, dict]:
    """The arguments of that call with the embeddings `new` in place of `old`.

    What a family adds in later blocks to a visual token (Qwen3-VL's deepstack features) is left out for those whose
    embedding is another one.
    """
    kwargs = {**kwargs, "input_ids": None, "inputs_embeds": new}
    deep, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if deep is not None and where is not None:
        same = (new == old).all(-1)[where.to(new.device)]
        kwargs["deepstack_visual_embeds"] = [x * same[:, None].to(x) for x in deep]
    return (), kwargs


def first_of(output) -> Tensor:
    """What a block or an MLP returns, without what some families add to it."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output, value: Tensor):
    """The same with `value` in the place of `first_of`."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def generate_output(sequences: Tensor, cache: Cache, values: dict, beams: dict | None = None):
    """What `generate` returns with `return_dict_in_generate`; `beams` are the entries that only beam search has."""
    entries: dict[str, Any] = {"sequences": sequences, CACHE: cache, **values}
    if beams is None:
        return GenerateDecoderOnlyOutput(**entries)
    return GenerateBeamDecoderOnlyOutput(**entries, **beams)


# Criteria and processors


def stops_at(stop_strings, tokenizer) -> StopStringCriteria:
    """The criterion that ends a sequence at one of these strings; `tokenizer` may be a processor."""
    return StopStringCriteria(text_tokenizer(tokenizer), stop_strings)


def constrains_prefixes(processors: Sequence[Any]) -> bool:
    """Whether `prefix_allowed_tokens_fn` is among the logits processors."""
    return any(isinstance(processor, PrefixConstrainedLogitsProcessor) for processor in processors)


def stopping_criteria(criteria: Sequence[Any]) -> StoppingCriteriaList:
    """The list in which `generate` takes criteria."""
    return StoppingCriteriaList(criteria)


def ends_at_eos(criteria: Sequence[Any]) -> bool:
    """Whether one of the stopping criteria looks for the end-of-sequence token."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)
