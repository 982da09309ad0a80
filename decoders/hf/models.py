"""Parts and facts of a model: its config, language model, blocks, vision tower, and how it was loaded."""

from __future__ import annotations

import inspect

from torch.nn import ModuleList
from transformers.cache_utils import (
    Cache,
)

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


def patches(model) -> int | None:
    """How many patches the vision tower cuts a picture (or tile) into, where it says that it takes one size alone."""
    tower = vision_tower(model)
    size = getattr(tower.config, "image_size", None)
    given = inspect.signature(tower.forward).parameters.get("interpolate_pos_encoding")
    if not isinstance(size, int) or given is None or given.default:
        return None
    height, width = patch_size(model)
    return (size // height) * (size // width)


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
