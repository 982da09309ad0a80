"""Directions of VTI: how they are made of demonstrations, and the file that holds them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decoders import RawInputs, StackError, hf

FORMAT = "vti directions 1"
COMMAND = "python -m experiments.tools.vti_directions"
_AT_ONCE = 10  # pictures that run through the vision tower together


@dataclass(frozen=True, eq=False)
class Directions:
    """What VTI adds, in a model of l blocks of width d, whose vision tower has L blocks of width d_v and P places.

    Attributes:
        text: float32 [l, d].
        vision: float32 [L, P, d_v], or None.
    """

    text: Tensor
    vision: Tensor | None = None

    @property
    def shapes(self) -> dict[str, int]:
        """l, d, L, P and d_v; the last three 0 without directions of the vision tower."""
        vision = (0, 0, 0) if self.vision is None else self.vision.shape
        return dict(zip(("l", "d", "L", "P", "d_v"), (*self.text.shape, *vision), strict=True))

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the numbers, as hex digits."""
        found = hashlib.sha256()
        for tensor in self._tensors().values():
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    def save(self, file: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write them as safetensors; shapes, checksum and `notes` become its metadata."""
        shapes = {name: str(size) for name, size in self.shapes.items()}
        metadata = {**(notes or {}), **shapes, "format": FORMAT, "sha256": self.checksum}
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), file, metadata)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"text": self.text} if self.vision is None else {"text": self.text, "vision": self.vision}
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def load(file: str | Path) -> Directions:
    """The directions in a file that `Directions.save` wrote; read again only where it has changed.

    Raises:
        StackError: for no such file, another kind of file, or one whose numbers are not those that were written.
    """
    place = Path(file).expanduser()
    if not place.is_file():
        raise StackError(f"vti: there is no file of directions '{file}'; make one: {COMMAND} out={file}")
    known = place.stat()
    return _load(place, (known.st_mtime_ns, known.st_size))


@functools.lru_cache(maxsize=4)
def _load(file: Path, stamp: tuple[int, int]) -> Directions:
    try:
        with safe_open(file, "pt") as data:
            metadata = data.metadata() or {}
            tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError) as error:
        raise StackError(f"vti: '{file}' cannot be read as safetensors: {error}; make it anew: {COMMAND}") from error
    if metadata.get("format") != FORMAT:
        raise StackError(
            f"vti: '{file}' holds no directions (its metadata say format {metadata.get('format')!r}, not {FORMAT!r});"
            f" make some: {COMMAND}"
        )
    found = Directions(tensors["text"], tensors.get("vision")) if "text" in tensors else None
    if found is None or metadata.get("sha256") != found.checksum:
        raise StackError(f"vti: '{file}' is damaged: its numbers do not have its checksum; make it anew: {COMMAND}")
    shapes = {name: str(size) for name, size in found.shapes.items()}
    if shapes.items() - metadata.items():
        raise StackError(f"vti: '{file}' is damaged: it holds {shapes}, its metadata say {metadata}")
    return found


def component(rows: Tensor) -> Tensor:
    """The first principal direction of rows [n, x], of length 1, signed so that the row that is farthest along it, to
    either side, is on its positive side.
    """
    centred = rows - rows.mean(0)
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    along = centred @ first
    return first * torch.sign(along[along.abs().argmax()])


@torch.no_grad()
def text_directions(model: Any, demonstrations: Sequence[tuple[dict, dict]]) -> Tensor:
    """What a true answer has and a hallucinated one has not, in the answer's last token: the mean of the differences
    and their first principal direction over all layers together.

    Args:
        demonstrations: inputs of the model, of one prompt and its answer, first the true one, then the other.

    Returns:
        float32 [l, d]: after each block, after the last one normed.
    """
    _check_count(len(demonstrations))
    rows = torch.stack([_last(model, true) - _last(model, false) for true, false in demonstrations]).cpu()
    flat = rows.flatten(1)  # [n, (l + 1) d], the embeddings first
    return (flat.mean(0) + component(flat)).view(rows.shape[1:])[1:].contiguous()


def _last(model: Any, inputs: dict) -> Tensor:
    """float32 [l + 1, d]: the last token's embedding, and what the blocks made of it, at last normed."""
    inner = hf.inner_language_model(model)
    norm = hf.final_norm(inner)
    if norm is None:
        raise StackError(f"vti: {type(inner).__name__} has no final norm where transformers puts it")
    states = RawInputs(model, inputs, [0]).last_hidden_states({})[0]
    weight = next(norm.parameters())
    return torch.cat([states[:-1], norm(states[-1:].to(weight)).float().to(states.device)])


@torch.no_grad()
def vision_directions(
    model: Any, pictures: Sequence[Tensor], share: float = 0.99, trials: int = 50, seed: int = 0, by_place: bool = True
) -> Tensor:
    """What pictures lack when nearly all patches are blanked, at each place of the vision tower: the mean of the
    differences and their first principal direction.

    Args:
        pictures: [colours, height, width] each, as the processor makes them; a tile counts as a picture.
        share: of the patches that are blanked, drawn anew in each of `trials`, by a generator seeded with `seed`.
        by_place: whether each place has a principal direction of its own, over all layers; else the cells [layer,
            place] are grouped one after another, as in the official code.

    Returns:
        float32 [L, P, d_v].

    Raises:
        StackError: for fewer than two pictures, or a model whose pictures have no fixed number of places.
    """
    _check_count(len(pictures))
    check_places(model)
    generator, patch = torch.Generator().manual_seed(seed), hf.patch_size(model)
    rows: Tensor | None = None  # [n, L + 1, P, d_v], by far the largest thing here
    for i, picture in enumerate(pictures):
        blanks = torch.stack([blanked(picture, share, patch, generator) for _ in range(trials)])
        row = sum(_places(model, part).sum(0) for part in blanks.split(_AT_ONCE)) / trials
        row = row - _places(model, picture[None])[0]
        rows = row.new_empty(len(pictures), *row.shape) if rows is None else rows
        rows[i] = row
    assert rows is not None
    n, layers, places, _ = rows.shape
    if not by_place:
        cells = rows.reshape(n, places, -1)
        components = torch.stack([component(cells[:, i]) for i in range(places)])
        return (rows.mean(0) + components.view_as(rows[0]))[1:].contiguous()
    components = torch.stack([component(rows[:, :, i].flatten(1)).view(layers, -1) for i in range(places)], 1)
    return (rows.mean(0) + components)[1:].contiguous()


def blanked(picture: Tensor, share: float, patch: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The picture [colours, height, width] with a share of its patches, drawn at random, at its mean colour."""
    height, width = patch
    rows, columns = picture.shape[1] // height, picture.shape[2] // width
    out, colour = picture.clone(), picture.mean((1, 2))[:, None, None]
    for at in torch.randperm(rows * columns, generator=generator)[: int(share * rows * columns)].tolist():
        y, x = at // columns * height, at % columns * width
        out[:, y : y + height, x : x + width] = colour
    return out


def _places(model: Any, pictures: Tensor) -> Tensor:
    """float32 [pictures, L + 1, P, d_v], on the CPU: of each place what the first block gets, and what each makes."""
    found: list[Tensor] = []
    tower, blocks = hf.vision_tower(model), hf.vision_blocks(model)
    weight = next(tower.parameters())
    with _watching(blocks, found):
        tower(pictures.to(weight.device, weight.dtype))
    return torch.stack(found, 1)


@contextmanager
def _watching(blocks: Any, found: list[Tensor]) -> Iterator[None]:
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: found.append(hf.input_of(args, kwargs).float().cpu()), with_kwargs=True
        )
    ]
    handles += [
        block.register_forward_hook(lambda module, args, out: found.append(hf.first_of(out).float().cpu()))
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_places(model: Any) -> None:
    """Raise StackError for a model whose vision tower cannot be steered place by place."""
    name = type(model).__name__
    if hf.vision_blocks(model) is None:
        raise StackError(
            f"vti: {name} has no vision tower whose blocks are known here; alpha_image=0 leaves it as it is"
        )
    if hf.sees_any_size(model):
        raise StackError(
            f"vti: {name} sees pictures at their own resolution, so that the places of a picture are not those of the"
            " demonstrations, and directions of places mean nothing; alpha_image=0 steers the text alone"
        )


def _check_count(count: int) -> None:
    if count < 2:
        raise StackError(f"vti: directions are made of at least two demonstrations, not of {count}")
