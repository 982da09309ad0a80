"""The seam to transformers: every name of it that is private, internal or has changed between versions stands here.

No other module of the loop or of a decoder imports transformers or uses such a name (`tests/decoders/test_hf.py` walks
their syntax trees). Where versions differ, the function that hides it says how.
What it relies on is checked when it is imported (`versions.py`).
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from packaging.version import Version
from torch import Tensor
from torch.nn import ModuleList

from .versions import VERSION, check_symbols, check_version

check_version(VERSION)
check_symbols()

from transformers import AttentionInterface, GenerationConfig, StoppingCriteriaList  # noqa: E402
from transformers.cache_utils import (  # noqa: E402
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.generation.configuration_utils import GenerationMode  # noqa: E402
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor  # noqa: E402
from transformers.generation.stopping_criteria import StopStringCriteria  # noqa: E402
from transformers.generation.utils import (  # noqa: E402
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

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


# Prompts

# Inputs with an entry a token of the prompt that say what kind of token it is.
TOKEN_KINDS = frozenset({"mm_token_type_ids", "token_type_ids"})


def image_inputs(names: Iterable[str]) -> list[str]:
    """Of the inputs of `generate`, those about pictures: all but the prompt's own."""
    return [name for name in names if name not in {"input_ids", "attention_mask", "position_ids"} | TOKEN_KINDS]


def needs_images(model) -> str | None:
    """Why the model does not generate from text alone, or None."""
    given = inspect.signature(model.generate).parameters.get("pixel_values")
    if given is None or given.default is not inspect.Parameter.empty:
        return None
    return f"{type(model).__name__}.generate asks for pixel_values"


def image_end_ids(config, tokenizer=None) -> set[int]:
    """The ids that mark where a picture ends, as far as the config names them, or a tokenizer or processor does."""
    names = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
    found = {token for name in names if isinstance(token := getattr(config, name, None), int)}
    words = ("end_image_token", "image_end_token", "eoi_token", "end_of_img_token", "fake_image_token")
    text = text_tokenizer(tokenizer)
    for word in (getattr(one, name, None) for one in (tokenizer, text) for name in words):
        if word is not None:
            found.add(text.convert_tokens_to_ids(str(word)))
    return found


# What a Q-Former reads beside the picture (InstructBLIP).
QFORMER_IDS, QFORMER_MASK = "qformer_input_ids", "qformer_attention_mask"


def text_tokenizer(tokenizer):
    """The language model's tokenizer, of a processor that has it; or None."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def qformer_tokenizer(processor):
    """The Q-Former's tokenizer, of a processor that has it; or None."""
    return getattr(processor, "qformer_tokenizer", None)


def any_pad_id(config) -> int:
    """An id for places that no token has."""
    return getattr(config.get_text_config(decoder=True), "pad_token_id", None) or 0


# Encoded images


def encoded_images(output) -> Tensor | list[Tensor] | None:
    """The features of each image in what a family's image encoder returned, or None where they are not known apart."""
    return getattr(output, "pooler_output", None)


def select_encoded_images(output, index: list[int]):
    """A copy of what an image encoder returned, with these images only; Qwen3-VL has features of several depths."""

    def choose(features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return features[index] if isinstance(features, Tensor) else [features[i] for i in index]

    out = copy.copy(output)
    out.pooler_output = choose(output.pooler_output)
    deep = getattr(output, "deepstack_features", None)
    if deep is not None and isinstance(deep[0][0], Tensor):
        out.deepstack_features = [choose(layer) for layer in deep]
    return out


# Models


def text_config(model):
    """The config of the language model."""
    return model.config.get_text_config(decoder=True)


def num_layers(model) -> int:
    """Blocks of the language model."""
    return text_config(model).num_hidden_layers


def layer_types(model) -> tuple[str, ...]:
    """The kind of attention of each layer by transformers' names; () where the config does not say."""
    return tuple(getattr(text_config(model), "layer_types", None) or ())


def attends_in_chunks(model) -> bool:
    """Whether layers attend within fixed chunks of the sequence."""
    return "chunked_attention" in layer_types(model) or bool(getattr(text_config(model), "attention_chunk_size", None))


def shares_layers(cache: Cache, model) -> bool:
    """Whether layers use the keys and values of others; newer versions put a `DummyLayer` in their place."""
    config = text_config(model)
    return (
        len(cache.layers) != config.num_hidden_layers
        or bool(getattr(config, "num_kv_shared_layers", None))
        or any(type(layer).__name__ == "DummyLayer" for layer in cache.layers)
    )


def has_cross_attention(model) -> bool:
    """Whether layers of the language model attend to the image beside the sequence (Mllama)."""
    return bool(getattr(text_config(model), "cross_attention_layers", None))


def logit_softcap(model) -> float | None:
    """The cap on the final logits (Gemma 2), or None."""
    return getattr(text_config(model), "final_logit_softcapping", None)


def text_model(model):
    """The language model without its output embeddings."""
    return model.get_decoder()


def blocks(model):
    """The blocks of the language model, or None where the family keeps them elsewhere."""
    return getattr(model.get_decoder(), "layers", None)


def mlp_of(block):
    """The MLP of a block, or None where the family keeps it elsewhere."""
    names = ("mlp", "feed_forward", "block_sparse_moe")
    return next((found for name in names if (found := getattr(block, name, None)) is not None), None)


def norms_of(block):
    """The norms of a block: before attention, before the MLP, and after the MLP, which only some families have (else
    None). None for all where a block has not the first two, or they stand elsewhere.
    """

    def first(*names: str):
        return next((found for name in names if (found := getattr(block, name, None)) is not None), None)

    before = first("input_layernorm")
    between = first("pre_feedforward_layernorm", "post_attention_layernorm")  # in Gemma the second follows attention
    after = first("post_feedforward_layernorm", "post_mlp_layernorm")
    return None if before is None or between is None else (before, between, after)


def output_projection(attention):
    """What an attention module makes its output with, of that of its heads, [..., h * d], or None."""
    names = ("o_proj", "out_proj", "dense")
    return next((found for name in names if (found := getattr(attention, name, None)) is not None), None)


def final_norm(model):
    """The norm before the output embeddings, or None where the family keeps it elsewhere."""
    return getattr(model.get_decoder(), "norm", None)


def output_embeddings(model):
    """What makes logits of hidden states, or None."""
    return model.get_output_embeddings()


def ties_embeddings(model) -> bool:
    """Whether input and output embeddings are one matrix; the config says so for some families, the weights for all."""
    weights = [getattr(m, "weight", None) for m in (model.get_output_embeddings(), model.get_input_embeddings())]
    return bool(getattr(model.config, "tie_word_embeddings", False)) or weights[0] is weights[1]


# Arguments of vision towers that take pictures of any size, each with as many places as it has patches.
_SIZES = frozenset({"grid_thw", "image_grid_thw", "image_sizes", "spatial_shapes"})


def width(model) -> int:
    """d, the size of a hidden state of the language model."""
    return text_config(model).hidden_size


def vision_tower(model):
    """What encodes pictures, or None; a text model names itself."""
    found = model.get_encoder(modality="image")
    return None if found is model or found is model.base_model else found


def vision_blocks(model):
    """The blocks of the vision tower, each with an MLP, or None where there is no tower or the family keeps them
    elsewhere.
    """
    tower = vision_tower(model)
    lists = () if tower is None else (module for module in tower.modules() if isinstance(module, ModuleList))
    return next((found for found in lists if len(found) and all(mlp_of(block) is not None for block in found)), None)


def vision_width(model) -> int | None:
    """The size of a hidden state of the vision tower, where its config says it."""
    return getattr(vision_tower(model).config, "hidden_size", None)


def patch_size(model) -> tuple[int, int]:
    """Height and width, in pixels, of the patches into which the vision tower cuts a picture."""
    found = vision_tower(model).config.patch_size
    return (found, found) if isinstance(found, int) else tuple(found)


def sees_any_size(model) -> bool:
    """Whether the vision tower takes pictures of any size, so that the number of places varies."""
    return bool(_SIZES & inspect.signature(vision_tower(model).forward).parameters.keys())


def placeholder_ids(config) -> dict[str, int]:
    """The ids that stand for images and videos in a prompt, by modality, of those that the model has.

    Families that older versions brought name them `image_token_index`, later ones `image_token_id`.
    """
    found = {}
    for kind in ("image", "video"):
        ids = [getattr(config, f"{kind}_token_{suffix}", None) for suffix in ("id", "index")]
        found[kind] = next((token for token in ids if token is not None), None)
    return {kind: token for kind, token in found.items() if token is not None}


def inner_language_model(model):
    """The model whose `generate` calls the loop: of families that wrap a language model and call its `generate`
    (InstructBLIP), that; else the model itself.
    """
    inner = getattr(model, "language_model", None)
    return inner if inner is not None and hasattr(inner, "lm_head") and not hasattr(model, "lm_head") else model


def is_compiled(model) -> bool:
    """Whether `torch.compile` was applied to the model or to its forward."""
    return getattr(model, "_compiled_call_impl", None) is not None or hasattr(
        model.forward, "_torchdynamo_orig_callable"
    )


def has_device_hooks(model) -> bool:
    """Whether accelerate moves between devices what goes from module to module."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def splits_forward(model) -> str | None:
    """Why a forward of the model is no single graph, or None: modules that accelerate moves between devices, and
    quantised weights, whose kernels are their own.
    """
    if has_device_hooks(model):
        return f"{type(model).__name__} is spread over devices (device_map), with hooks between its parts"
    if getattr(model, "hf_quantizer", None) is not None:
        return f"{type(model).__name__} has quantised weights, whose kernels are not part of a graph"
    return None


def is_tensor_parallel(model) -> bool:
    """Whether the weights are split over processes by `tp_plan`."""
    return getattr(model, "_tp_size", None) not in (None, 1)


def is_fully_sharded(model) -> bool:
    """Whether FSDP, of the first or second kind, wraps the model."""
    kinds = {type(module) for module in model.modules()}
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in kinds for base in kind.__mro__)


def weights_missing(model) -> str | None:
    """The name of a parameter that is on the meta device and that nothing brings back, or None.

    accelerate keeps offloaded weights there, too, and loads them in a hook of the module or of one above it.
    """
    loads: set[str] = set()
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks) or name.rpartition(".")[0] in loads:
            loads.add(name)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                return f"{name}.{own}".lstrip(".")
    return None


# Caches


def is_offloaded(cache: Cache) -> bool:
    """Whether the cache keeps its layers on another device between uses."""
    return bool(getattr(cache, "offloading", False))


def keeps_keys(cache: Cache) -> bool:
    """Whether some layer keeps keys and values. A model of running states alone (Mamba) hands over no cache up to 5.23,
    from 5.24 on one of such layers.
    """
    return not cache.layers or any(not isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


def is_plain_cache(cache: Cache) -> bool:
    """Whether `generate` made this cache, of layers that grow; it marks those of the caller."""
    return isinstance(cache, DynamicCache) and not getattr(cache, "_is_user_defined", False) and bool(cache.layers)


def empty_cache(model) -> Cache:
    """The cache that `generate` makes for the model."""
    return DynamicCache(config=model.config)


def reorder(cache: Any, rows: Tensor) -> None:
    """Row i of a cache, or of one of its layers, becomes row `rows[i]`, long [m]."""
    cache.reorder_cache(rows)


def layer_kind(layer) -> str | None:
    """`full`, `sliding` or `recurrent` for the layers that the loop knows, else None."""
    kinds: dict[type, str] = {
        DynamicLayer: "full",
        DynamicSlidingWindowLayer: "sliding",
        LinearAttentionLayer: "recurrent",
    }
    return kinds.get(type(layer))


class GrowingLayer(DynamicLayer):
    """Base of the loop's own cache layers: keys and values [m, h, t, d], of which there are none at first.

    Up to 5.23 a layer also keeps the dtype of its keys, from 5.24 on it does not.
    """

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Take dtype, device and shape from the first keys and values, and hold none of them."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]

    @property
    def begun(self) -> bool:
        """Whether the layer was ever written."""
        return self.is_initialized


class RecurrentLayer(LinearAttentionLayer):
    """Base of the loop's own layers of running states."""

    @classmethod
    def like(cls, layer: LinearAttentionLayer) -> Self:
        """An empty layer with as many states as the given one."""
        return cls(number_of_states=layer.number_of_states)

    def states(self) -> tuple[dict[int, Tensor | None], ...]:
        """The running states, rows first, by number; convolutions, then linear attention."""
        return self.conv_states, self.recurrent_states


# Attention


def _has_name(model, name: str) -> bool:
    """Whether the module that defines the language model has this name."""
    return hasattr(sys.modules[type(model.get_decoder()).__module__], name)


def attends_by_registry(model) -> bool:
    """Whether the language model finds its attention among the registered functions; older families do not."""
    return _has_name(model, "ALL_ATTENTION_FUNCTIONS")


def takes_ready_masks(model) -> bool:
    """Whether the language model leaves a mask of four dimensions as it is, as transformers' common functions do;
    families that make masks themselves take two dimensions, or None.
    """
    return _has_name(model, "create_causal_mask")


def attention_name(model) -> str:
    """The `attn_implementation` of the language model."""
    return text_config(model)._attn_implementation


@contextmanager
def attention_replaced(model, name: str) -> Iterator[None]:
    """Within, the language model attends by the registered function `name`; restored whatever happens.

    `set_attn_implementation` would also touch the vision tower and check kernels; the attribute under it is stable.
    """
    config = text_config(model)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def register_attention(name: str, function: Callable, like: str) -> None:
    """Register an attention function that gets the masks of the function `like`.

    Without a mask function of its own name transformers would drop the causal mask of the prefill.
    """
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


def attention_function(name: str) -> Callable:
    """The registered attention function."""
    return ALL_ATTENTION_FUNCTIONS[name]


class _Overridden:
    """An object with some of its attributes replaced, which passes for the original in `isinstance`."""

    def __init__(self, base: Any, **values: Any) -> None:
        self.__dict__.update(values, _base=base)

    @property  # type: ignore[misc]  # `object` lets it be assigned, too
    def __class__(self):
        return type(self._base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def as_attention(module, name: str):
    """The attention module as if its config named `name`: flash attention finds its kernel by that name."""
    return _Overridden(module, config=_Overridden(module.config, _attn_implementation=name))


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


def layer_window(layer) -> int | None:
    """The window of a sliding layer."""
    return getattr(layer, "sliding_window", None)
