"""Processors: load a model's own, or make one of the same class whose tokenizer knows the special tokens and little
else.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from ..inputs.errors import InputError

WORDS = ("<pad>", "<s>", "</s>", "<unk>")
ROLES = ("pad_token", "bos_token", "eos_token")


def load(path: str, **options) -> ProcessorMixin:
    """`AutoProcessor`; where torchvision is missing, which only videos need, a processor of images and text.

    Args:
        path: hub id or folder.
    """
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path, **options)
    kind = getattr(transformers, _class(path, options) or "", None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(path, **options)
    return images_only(kind).from_pretrained(path, **options)


def _class(path: str, options: dict) -> str | None:
    """The name of the processor's class, which older checkpoints keep with the image processor."""
    found, _ = ProcessorMixin.get_processor_dict(path, **options)
    if "processor_class" not in found:
        found, _ = ImageProcessingMixin.get_image_processor_dict(path, **options)
    return found.get("processor_class")


@functools.cache
def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without its video processor, which needs torchvision."""

    class ImagesOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args, **options) -> list:
            return [*super()._get_arguments_from_pretrained(*args, **options), None]

        def check_argument_for_proper_class(self, name: str, argument: Any):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    ImagesOnly.__name__ = kind.__name__
    return ImagesOnly


def synthetic(spec: dict) -> ProcessorMixin:
    """A processor of the class `spec["type"]` that needs no download: the same image tokens as the true one, and words
    that are all alike.

    Args:
        spec: `type` (a class of transformers); `image_processor` with `type` and its options; `tokens`, the special
            tokens with their ids; `names`, which attributes of the tokenizer some of them are; `options` of the
            processor.
    """
    spec = {"options": {}, "names": {}, **spec}
    kind, pictures = getattr(transformers, spec["type"]), dict(spec["image_processor"])
    options = dict(spec["options"])
    if "video_processor" in kind.get_attributes():
        kind, options = images_only(kind), options | {"video_processor": None}
    if "qformer_tokenizer" in kind.get_attributes():
        options["qformer_tokenizer"] = _tokenizer({}, {})
    tokenizer = _tokenizer(spec["tokens"], spec["names"])
    return kind(image_processor=getattr(transformers, pictures.pop("type"))(**pictures), tokenizer=tokenizer, **options)


def qformer_on_the_right(inputs: dict) -> dict:
    """The inputs with a Q-Former's text, if any, padded on the right.

    InstructBLIP's processor pads it as the prompt, on the left, which shifts the places of its words, so that a
    picture's tokens would depend on the batch.
    """
    mask = inputs.get("qformer_attention_mask")
    if mask is not None:
        order = mask.argsort(dim=-1, descending=True, stable=True)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = inputs[name].gather(1, order)
    return inputs


def _tokenizer(tokens: dict[str, int], names: dict[str, str]) -> PreTrainedTokenizerFast:
    taken = set(tokens.values())
    words = {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), 200)}
    vocabulary = {word: i for word, i in words.items() if i not in taken and word not in tokens} | tokens
    if "<unk>" not in vocabulary:
        raise InputError(f"the special tokens {sorted(tokens)} leave no place for <unk> (id 3)")
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    known = {
        name: token
        for name, token in (("pad_token", "<pad>"), ("bos_token", "<s>"), ("eos_token", "</s>"))
        if token in vocabulary
    }
    known |= {name: token for name, token in names.items() if name in ROLES}
    extra = {name: token for name, token in names.items() if name not in ROLES}
    known |= {"extra_special_tokens": extra} if extra else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", additional_special_tokens=list(tokens), padding_side="left", **known
    )
