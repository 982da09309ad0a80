"""What transformers prepares before the loop begins: inputs of one image each, also those of a branch."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import hf


@dataclass
class PreparedInputs:
    """What `generate` hands to a decoding function; and the ids as the caller gave them, [b, prompt], image tokens
    included, if any.
    """

    model: Any
    input_ids: Tensor
    kwargs: dict
    config: hf.GenerationConfig
    ids: Tensor | None = None

    @property
    def prompt(self) -> int:
        """Length of the prompt in cache slots."""
        embeds = self.kwargs.get("inputs_embeds")
        return self.input_ids.shape[1] if embeds is None else embeds.shape[1]


def by_name(model, args: tuple, kwargs: dict) -> dict:
    """The arguments of `model.generate(*args, **kwargs)` by their names."""
    names = ["input_ids" if name == "inputs" else name for name in inspect.signature(model.generate).parameters]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def prepare_inputs(model, kwargs: dict) -> PreparedInputs:
    """What `model.generate(**kwargs)` would decode, without beams or returned sequences, and without decoding it."""
    found: list[PreparedInputs] = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(PreparedInputs(model, input_ids, kwargs, generation_config))
        return input_ids

    before = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    tokens = {name: getattr(before, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    tokens |= {name: kwargs[name] for name in tokens if name in kwargs}
    config = hf.GenerationConfig(max_new_tokens=1, use_cache=True, **copy.deepcopy(tokens))
    inputs = {
        k: v
        for k, v in kwargs.items()
        if not hasattr(config, k)
        and k not in ("generation_config", "logits_processor", "stopping_criteria", "custom_generate")
    }
    with torch.no_grad():
        model.generate(**inputs, generation_config=config, custom_generate=catch)
    found[0].ids = inputs.get("input_ids")
    return found[0]


def one_an_image(given: PreparedInputs, times: int, tokens: dict[str, int]) -> PreparedInputs | None:
    """Undo `generate`'s repetition of each image's inputs, so that its prompt runs once; None where they do not tell
    which pictures belong to which prompt.

    Args:
        times: how often each image stands there.
        tokens: the model's placeholder id by modality, `image` and `video`.
    """
    if times == 1:
        return given
    n, kwargs = max(len(given.input_ids), len(given.kwargs.get("inputs_embeds", ()))), dict(given.kwargs)
    ids = given.input_ids[::times].contiguous()  # models view what they get
    for name, value in kwargs.items():
        if name == hf.ENCODED and value:
            kwargs[name] = {
                modality: _features(one, ids, tokens.get(modality), times) for modality, one in value.items()
            }
            if None in kwargs[name].values():
                return None
        elif name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:  # [rotary axes, n, t]
            kwargs[name] = value[:, ::times].contiguous()
        elif isinstance(value, Tensor) and value.ndim:
            if len(value) == n:
                kwargs[name] = value[::times].contiguous()
            elif (parts := _patches(given.kwargs, name, n)) is not None:
                kwargs[name] = torch.cat(value.split(parts)[::times])
            else:  # several pictures a prompt, which versions of transformers repeat in different orders
                return None
    own = given.ids
    return PreparedInputs(given.model, ids, kwargs, given.config, own if own is None or len(own) < n else own[::times])


def _patches(kwargs: dict, name: str, n: int) -> list[int] | None:
    """Patches of each prompt's picture, where each has one."""
    grid = kwargs.get({"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}.get(name))
    return None if grid is None or len(grid) != n else grid.prod(-1).tolist()


def _features(output, ids: Tensor, token: int | None, times: int):
    """Encoded pictures without the repetition, or None where it is not known how they were repeated."""
    pictures = hf.encoded_images(output)
    if pictures is None:
        return output
    stays = _once(pictures, ids, token, times)
    return None if stays is None else hf.select_encoded_images(output, stays)


def _once(pictures: Tensor | list[Tensor], ids: Tensor, token: int | None, times: int) -> list[int] | None:
    """Places of the pictures that stay, when each stands there `times` times: a prompt's together, as in most families,
    or each by itself, as in GLM-4V.
    """
    counts = [int(c) for c in (ids == token).sum(-1)] if ids.shape[1] and token is not None else None
    stays: list[int] = []
    at, n = 0, len(ids)
    for prompt in range(n):
        share = len(pictures) // (n * times)  # without ids to count in, as many pictures in every prompt
        if counts is not None:
            share, seen = 0, 0
            while seen < counts[prompt] and at + share < len(pictures):
                seen, share = seen + len(pictures[at + share]), share + 1
        if not all(_same(pictures, at + i, at + share + i) for i in range(share)):
            break
        stays += range(at, at + share)
        at += share * times
    if at == len(pictures):
        return stays
    alone = range(0, len(pictures), times)
    return list(alone) if len(pictures) % times == 0 and all(_same(pictures, i, i + 1) for i in alone) else None


def _same(pictures: Tensor | list[Tensor], i: int, j: int) -> bool:
    return j < len(pictures) and pictures[i].shape == pictures[j].shape and torch.equal(pictures[i], pictures[j])
