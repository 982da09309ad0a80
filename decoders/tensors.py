"""Tensors that grow, and are padded to a common shape."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def entries(x: Tensor, index: list[int]) -> Tensor:
    """Entries of the first dimension; a view where they stand together."""
    together = index == list(range(index[0], index[0] + len(index)))
    return x[index[0] : index[0] + len(index)] if together else x[index]


def write_at(buffer: Tensor, index: Tensor, value: Tensor, width: int) -> Tensor:
    """A copy of `buffer`, [n, s, ...], at least `width` long (zeros), with `value`, [n, ...], at `index`, long [n] and
    less than `width`, of each row.
    """
    short = width - buffer.shape[1]
    grown = torch.nn.functional.pad(buffer, (0, 0) * (buffer.ndim - 2) + (0, short)) if short > 0 else buffer
    value = value.to(buffer.dtype)[:, None]
    return grown.scatter(1, index.view(-1, *[1] * (buffer.ndim - 1)).expand_as(value), value)


def pad_or_crop(tensor: Tensor, shape: list[int], fill: int = 0) -> Tensor:
    """Padded, or cut, at the ends of its dimensions to `shape`."""
    if list(tensor.shape) == shape:
        return tensor
    out = tensor.new_full(shape, fill)
    both = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    out[both] = tensor[both]
    return out


def left_pad(tensor: Tensor, length: int, dim: int = -1, fill: int = 0) -> Tensor:
    """Padded on the left of `dim` to `length`."""
    short = length - tensor.shape[dim]
    if short <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor.new_full(shape, fill), tensor], dim)


def pad_slots(x: Tensor, capacity: int, fill: float = 0) -> Tensor:
    """Padded at the end of the last dimension to `capacity`."""
    return torch.nn.functional.pad(x, (0, capacity - x.shape[-1]), value=fill) if x.shape[-1] < capacity else x


def rows_first(mask: Tensor) -> Tensor:
    """[s, q, L or 1, t] of a mask [L or 1, s, q, t]."""
    return rearrange(mask, "L s q t -> s q L t")
