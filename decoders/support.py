"""What decoders can be run on: the layers of a model's cache, and the reason where something is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import hf
from .attention import unreadable
from .errors import StackError
from .interface import Decoder, Reads


@dataclass(frozen=True)
class Layers:
    """Which layers of a model decoders may read and prune.

    Attributes:
        whole: indices of the layers that attend to the whole sequence; decoders count these from 0.
        windowed: indices of those that attend within a window. They keep all their slots.
        recurrent: indices of those that keep a running state (linear attention, convolutions) and no slots.
        short: why the first kind can be neither read nor pruned, where all layers have windows shorter than prompt and
            answer.
    """

    whole: tuple[int, ...]
    windowed: tuple[int, ...] = ()
    recurrent: tuple[int, ...] = ()
    short: str | None = None

    @property
    def ordinary(self) -> bool:
        """Whether every layer attends to the whole sequence."""
        return not (self.windowed or self.recurrent or self.short)


def layers(cache: hf.Cache | None, model, reach: int) -> Layers | str:
    """The kinds of a model's layers by the cache that transformers prepared for it, or why it cannot be decoded by a
    stack with decoders.

    Args:
        reach: most tokens that prompt and answer can have. Where every layer has a window at least as long, none is
            ever cut.
    """
    if cache is None:
        return "it was given no cache"
    if hf.is_offloaded(cache):
        return "an offloaded cache keeps its slots on another device; leave cache_implementation out"
    if not hf.is_plain_cache(cache):
        return (
            f"a {type(cache).__name__} of the caller's own, or of a cache_implementation, cannot be pruned row by row;"
            f" leave {hf.CACHE} and cache_implementation out"
        )
    if not hf.attends_by_registry(model):
        return "its attention is not among transformers' attention functions, in whose place this loop puts its own"
    if hf.shares_layers(cache, model):
        return "some of its layers share the keys and values of others"
    kinds: dict[str | None, list[int]] = {"full": [], "sliding": [], "recurrent": []}
    for i, layer in enumerate(cache.layers):
        kind = hf.layer_kind(layer)
        if kind is None:
            return f"layer {i} has a {type(layer).__name__}, whose slots cannot be dropped, reordered and brought back"
        kinds[kind].append(i)
    whole, windowed, recurrent = (tuple(found) for found in kinds.values())
    if windowed and hf.attends_in_chunks(model):
        return "its layers attend in chunks, whose masks this loop does not make"
    windows = {window for i in windowed if (window := hf.layer_window(cache.layers[i])) is not None}
    if len(windows) > 1:
        return (
            f"its layers have windows of different lengths ({', '.join(map(str, sorted(windows)))} tokens), for which"
            " this loop makes no masks"
        )
    if not whole:
        if recurrent:
            return "none of its layers attends to the whole sequence"
        (window,) = windows
        short = (
            f"none of its layers attends to the whole sequence (the window is {window} tokens, prompt and answer may"
            f" have {reach}), so that none can be read or pruned"
        )
        return Layers(windowed, short=short if window < reach else None)
    if windowed and not hf.layer_types(model):
        return "its configuration does not say which layers attend within a window (layer_types)"
    return Layers(whole, windowed, recurrent)


def wrapped(model) -> str | None:
    """Why decoders cannot act on a model because of what was done to it, or None."""
    if hf.is_compiled(model):
        return (
            "the model is compiled (torch.compile), so what decoders read and change inside it is out of their reach;"
            " use it uncompiled"
        )
    if hf.is_tensor_parallel(model):
        return (
            "its weights are split over processes by tensor parallelism, where each sees only some attention heads;"
            " load it without tp_plan (device_map='auto' is supported)"
        )
    if hf.is_fully_sharded(model):
        return (
            "it is wrapped by FSDP, whose processes must all take the same steps; load it without (device_map='auto' is"
            " supported)"
        )
    return None


def reason(model, config, decoder: Decoder, reads: Reads, kinds: Layers | str, masked: bool) -> str | None:
    """Why this decoder cannot act on this model, or None if it can.

    Args:
        model: the model that is decoded; `config` is that of the one that the caller named, with the image-token id.
        masked: whether the caller says where the visual tokens are.
    """
    if isinstance(kinds, str):
        return kinds
    if reads.attention != () or reads.lookahead or kinds.windowed:
        found = unreadable(model)
        if found:
            return found
    touches = any(
        getattr(type(decoder), hook) is not getattr(Decoder, hook) for hook in ("observe", "before_first_token")
    )
    if kinds.short and (touches or reads.attention != () or reads.visual or reads.lookahead or reads.rollback):
        return kinds.short
    if reads.visual and not masked and not hf.placeholder_ids(config):
        return (
            f"{type(model).__name__} has no image-token id, so its visual tokens cannot be found. "
            + (
                "Give"
                if hasattr(config, "vision_config")
                else "Call stack.generate(model, ...) with the vision-language model itself, or give"
            )
            + " their places: Stack([...], visual_mask=mask)."
        )
    if kinds.recurrent and (reads.lookahead or reads.rollback):
        return (
            f"layers such as {kinds.recurrent[0]} keep a running state (linear attention or convolutions), in which"
            " candidates cannot be tried side by side nor words taken back"
        )
    if kinds.recurrent and reads.again:
        return (
            f"layers such as {kinds.recurrent[0]} keep a running state (linear attention or convolutions), so that the"
            " last prompt token cannot run again, as pruning before the first token needs"
        )
    if reads.hidden and (hf.blocks(model) is None or hf.output_embeddings(model) is None):
        return (
            f"{type(model).__name__} has no decoder blocks or output embeddings where transformers puts them, so its"
            " hidden states cannot be read"
        )
    try:
        reads.layers(len(kinds.whole))
    except StackError as error:
        return str(error)
    return None


def refusals(model, decoders: Sequence[Decoder], reach: int, masked: bool) -> list[str | None]:
    """Why each decoder cannot act on `model`, or None if it can; runs nothing, so the model may be on the meta
    device.
    """
    inner = hf.inner_language_model(model)
    why = undecodable(model) or wrapped(inner)
    kinds = why or layers(hf.empty_cache(inner), inner, reach)
    out = []
    for decoder in decoders:
        try:
            out.append(why or reason(inner, model.config, decoder, decoder.reads(inner), kinds, masked))
        except StackError as error:
            out.append(str(error))
    return out


def undecodable(model) -> str | None:
    """Why no stack, not even the empty one, decodes this model, or None."""
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} is an encoder-decoder model; the loop decodes decoder-only models"
    tuned = getattr(model, "active_peft_config", None)
    if tuned is not None and getattr(tuned, "is_prompt_learning", False):
        return (
            f"{type(model).__name__}: its adapter ({tuned.peft_type.value}) puts virtual tokens before the prompt,"
            " whose slots this loop does not know; adapters of weights (LoRA, ...) are supported"
        )
    if hf.has_cross_attention(model):
        return (
            f"{type(model).__name__} sees its picture through cross-attention layers, which this loop does not carry"
            " on; it decodes models that take the picture into the prompt"
        )
    return None
