"""What is refused, and why: models and requests that a stack, or one of its decoders, cannot decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import hf
from .attention import unreadable
from .cache_layers import LeftCache
from .errors import StackError
from .interface import Decoder, Edits, Requirements, resolve

WHOLE_CONVERSATION = (
    "inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True,"
    " return_tensors='pt'), then stack.generate(model, **inputs)"
)


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
    """The kinds of a model's layers by the cache that transformers prepared for it, or why a stack with decoders cannot
    decode it.

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


def reason(model, config, decoder: Decoder, needs: Requirements, kinds: Layers | str, masked: bool) -> str | None:
    """Why this decoder cannot act on this model, or None if it can.

    Args:
        model: the model that is decoded; `config` is that of the one that the caller named, with the image-token id.
        masked: whether the caller says where the visual tokens are.
    """
    if isinstance(kinds, str):
        return kinds
    if needs.attention != () or needs.edits.attention != () or needs.lookahead or kinds.windowed:
        found = unreadable(model)
        if found:
            return found
    touches = needs.edits.drops or any(
        getattr(type(decoder), hook) is not getattr(Decoder, hook)
        for hook in ("select_slots", "select_slots_after_prefill")
    )
    if kinds.short and (touches or needs.attention != () or needs.visual or needs.lookahead or needs.rollback):
        return kinds.short
    if needs.visual and not masked and not hf.placeholder_ids(config):
        return (
            f"{type(model).__name__} has no image-token id, so its visual tokens cannot be found. "
            + (
                "Give"
                if hasattr(config, "vision_config")
                else "Call stack.generate(model, ...) with the vision-language model itself, or give"
            )
            + " their places: Stack([...], visual_mask=mask)."
        )
    if kinds.recurrent and (needs.lookahead or needs.rollback):
        return (
            f"layers such as {kinds.recurrent[0]} keep a running state (linear attention or convolutions), in which"
            " candidates cannot be tried side by side nor words taken back"
        )
    if kinds.recurrent and needs.reruns_last_token:
        return (
            f"layers such as {kinds.recurrent[0]} keep a running state (linear attention or convolutions), so that the"
            " last prompt token cannot run again, as pruning before the first token needs"
        )
    if (needs.hidden or needs.early_logits) and (hf.blocks(model) is None or hf.output_embeddings(model) is None):
        return (
            f"{type(model).__name__} has no decoder blocks or output embeddings where transformers puts them, so its"
            " hidden states cannot be read"
        )
    if needs.early_logits and needs.early_norm and hf.final_norm(model) is None:
        return (
            f"{type(model).__name__} has no final norm where transformers puts it (get_decoder().norm), so its early"
            " layers cannot be read"
        )
    try:
        needs.resolve_layers(len(kinds.whole))
        return _not_editable(model, needs.edits, kinds)
    except StackError as error:
        return str(error)


def _not_editable(model, edits: Edits, kinds: Layers) -> str | None:
    """Why a decoder cannot act inside the forward of this model where it wants to, or None if it can.

    Raises:
        StackError: for layers that the model does not have.
    """
    attention = resolve(edits.attention, len(kinds.whole), "attention of layers")
    mlps = resolve(edits.mlp, hf.num_layers(model), "the MLP of blocks")
    states = resolve(edits.hidden, hf.num_layers(model) + 1, "hidden states")
    whole, blocks = len(kinds.whole), hf.num_layers(model)
    for given, found, count in ((edits.attention, attention, whole), (edits.mlp, mlps, blocks)):
        if isinstance(given, slice) and not found:
            there = f"{given.start or 0} <= i < {count if given.stop is None else given.stop}"
            return f"it edits layers {there}, of which the model has none; it has {_counted(count)}"
    if edits.hides and attention and attention[0] + 1 == whole:
        return (
            f"it hides tokens from the layers after layer {attention[0]}, and the model has none there; it has"
            f" {_counted(whole)}"
        )
    if (mlps or states) and hf.blocks(model) is None:
        return f"{type(model).__name__} has no decoder blocks where transformers puts them, so they cannot be changed"
    if any(hf.mlp_of(hf.blocks(model)[i]) is None for i in mlps):
        return f"blocks of {type(model).__name__} have no MLP where transformers puts it, so it cannot be changed"
    return None


def _counted(layers: int) -> str:
    return f"{layers}, counted from 0 to {layers - 1}"


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
            if not why:
                decoder.check_model(model)
            needs = decoder.requirements(inner)
            found = why or reason(inner, model.config, decoder, needs, kinds, masked)
            if found is None and needs.branch is not None and not needs.branch.images:
                found = hf.needs_images(model)
            out.append(found)
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


def check_call(model, args: tuple) -> None:
    """Refuse what is no call of `stack.generate(model, **inputs)`."""
    if isinstance(model, type) or not callable(getattr(model, "generate", None)):
        raise StackError(
            "stack.generate(model, **inputs): the first argument is a model with its weights, not"
            f" {type(model).__name__ if not isinstance(model, type) else 'the class ' + model.__name__}"
        )
    if args and isinstance(args[0], Mapping):
        raise StackError("give the inputs by name: stack.generate(model, **inputs)")


def check_request(model, decoders: Sequence[Decoder], kwargs: dict) -> None:
    """Refuse what can be refused before transformers prepares the request, by name."""
    caching = kwargs.get("cache_implementation") or getattr(
        kwargs.get("generation_config"), "cache_implementation", None
    )
    if decoders and caching not in (None, "dynamic"):
        raise StackError(
            f"cache_implementation='{caching}' makes a cache that decoders cannot prune, reorder and bring back row"
            " by row; leave it out"
        )
    if str(caching).startswith("offloaded") and not torch.accelerator.is_available():
        raise StackError(
            f"cache_implementation='{caching}' keeps the cache in the CPU's memory while a GPU computes, and torch"
            " finds no GPU here; leave cache_implementation out"
        )
    if (why := undecodable(model)) is not None:
        raise StackError(why)
    if (name := hf.weights_missing(model)) is not None:
        raise StackError(
            f"{type(model).__name__} has no values for its weights, of which {name} is on the meta device; load it"
            " with from_pretrained, and where it is offloaded leave accelerate's hooks in place"
        )
    if decoders and kwargs.get("synced_gpus"):
        raise StackError(
            "synced_gpus (DeepSpeed ZeRO-3, FSDP) makes all processes take the same steps, which decoders do not;"
            " use device_map='auto' in one process"
        )
    if decoders and (why := wrapped(model)):
        raise StackError(f"{decoders[0].name} cannot act on {type(model).__name__}: {why}")
    if kwargs.get("assistant_model") is not None:
        raise StackError("assistant models draft tokens outside this loop; leave assistant_model out")
    for decoder in decoders:
        decoder.check_model(model)


def check_generation(
    model,
    config: hf.GenerationConfig,
    kwargs: dict,
    processors,
    streamer,
    decoders: Sequence[Decoder],
    requirements: Sequence[Requirements],
    rows: int,
) -> None:
    """Refuse what this loop does not decode, by name."""
    if (why := undecodable(model)) is not None:
        raise StackError(why)
    cache = hf.cache_of(kwargs)
    if decoders and cache is not None and cache.get_seq_length() and not isinstance(cache, LeftCache):
        raise StackError(
            f"{hf.CACHE} is a filled cache that no decoders of a stack left; pass the whole conversation instead, and"
            f" no cache: {WHOLE_CONVERSATION}"
        )
    if hf.search_mode(config) not in hf.SEARCHES:
        raise StackError(
            f"generation mode '{hf.search_mode(config).value}' is not decoded by this loop, which decodes"
            " greedily, by sampling and by beam search"
        )
    if not config.use_cache or not kwargs.get("use_cache", True):
        raise StackError("the loop needs the key-value cache; leave use_cache=True")
    if config.prefill_chunk_size is not None:
        raise StackError("chunked prefill is not supported; leave prefill_chunk_size=None")
    if config.low_memory:
        raise StackError("low_memory beam search is not supported, as in transformers; leave low_memory out")
    if streamer is not None and config.num_beams > 1:
        raise StackError(
            "a streamer cannot show beam search, in which earlier words still change; leave streamer out or set"
            " num_beams=1"
        )
    check_hooks(streamer, config, processors, decoders, requirements, rows)


def check_hooks(
    streamer,
    config: hf.GenerationConfig,
    processors,
    decoders: Sequence[Decoder],
    requirements: Sequence[Requirements],
    rows: int,
) -> None:
    """Refuse what decoders that go back or look ahead do not go with, by name."""
    returning = [d.name for d, r in zip(decoders, requirements, strict=True) if r.rollback]
    if streamer is not None and returning:
        raise StackError(f"{returning[0]} may take words back, which a streamer cannot; leave streamer out")
    if returning and rows > config.num_beams and hf.constrains_prefixes(processors):
        raise StackError(
            f"prefix_allowed_tokens_fn counts on all images being equally long, which {returning[0]} does not keep;"
            " pass one image at a time"
        )
    for decoder, needs in zip(decoders, requirements, strict=True):
        if needs.rollback and not needs.lookahead:
            raise StackError(
                f"{decoder.name} requires rollback without lookahead; rows go back where `rescore_candidates` asks for"
                " it, which needs candidates: Requirements(lookahead=..., rollback=True)"
            )
    ahead = [d.name for d, r in zip(decoders, requirements, strict=True) if r.lookahead]
    if ahead and (config.output_attentions or config.output_hidden_states) and config.return_dict_in_generate:
        raise StackError(
            f"{ahead[0]} runs candidates in a tree, of which output_attentions and output_hidden_states would show the"
            " wrong ones; leave them out"
        )


def runs_before_prefill(decoder: Decoder, needs: Requirements) -> bool:
    """Whether the decoder runs the model on prompts before the prefill: what it finds is for hooks inside the forward,
    so only where it has some.
    """
    return bool(needs.edits) and type(decoder).before_prefill is not Decoder.before_prefill


def check_pictures(decoders: Sequence[Decoder], requirements: Sequence[Requirements]) -> None:
    """Refuse to continue a conversation with decoders that see its pictures while the prompt runs."""
    for decoder, needs in zip(decoders, requirements, strict=True):
        if needs.edits.reads_prompt or runs_before_prefill(decoder, needs):
            raise StackError(
                f"this cache cannot be continued: {decoder.name} looks at the pictures while their prompt runs. Pass"
                f" the whole conversation and no cache: {WHOLE_CONVERSATION}"
            )


def check_continuation(left: LeftCache, ids: torch.Tensor, placeholders: Sequence[int], branches: bool) -> None:
    """Refuse a conversation that does not go on where the cache ends.

    Args:
        ids: long [b, prompt], the whole conversation; `placeholders`: ids that stand for images in it.
        branches: whether a decoder runs the model on other inputs as well.
    """
    why = left.unknown
    length, rows = left.length, len(left.ids)
    if branches:
        why = "a decoder runs the model on other inputs as well, whose keys and values are not in it"
    elif why is None and (len(ids) != rows or ids.shape[1] <= length):
        why = (
            f"it holds {rows} rows of {length} tokens, and input_ids are {len(ids)} of {ids.shape[1]}; they are the"
            " whole conversation: what was returned, and what follows"
        )
    elif why is None and not torch.equal(ids[:, :length], left.ids.to(ids.device)):
        why = "input_ids do not begin with the tokens that are in it: what was returned, from its first token on"
    elif why is None and torch.isin(ids[:, length:], torch.tensor(placeholders, device=ids.device)).any():
        why = "there are new pictures"
    if why is not None:
        raise StackError(
            f"this cache cannot be continued: {why}. Or pass the whole conversation and no cache: {WHOLE_CONVERSATION}"
        )
