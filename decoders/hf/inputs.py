"""What processors and `generate` call the inputs of a prompt, and images that are encoded already."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable

from torch import Tensor

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
