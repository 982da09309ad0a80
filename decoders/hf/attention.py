"""Key-value caches, attention functions and their masks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .models import text_config

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


def layer_window(layer) -> int | None:
    """The window of a sliding layer."""
    return getattr(layer, "sliding_window", None)


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
