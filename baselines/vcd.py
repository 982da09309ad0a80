"""VCD (CVPR 2024): contrast the picture with a distorted one."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from decoders import Branch, Decoder, Requirements, StackError, Step, hf
from decoders.options import check_choice, check_integer, check_number

_PRUNING = {"copied": "mirror", "own": "independent"}  # ours, by the option's values
_CHOICES = {"distortion": ("noise", "blank", "mean", "blur"), "prunes": ("copied", "own")}
_STEPS = 1000  # of the diffusion that the noise is taken from


@dataclass
class VCD(Decoder):
    """Contrast with a branch that sees a noised image.

    The rows run a second time beside themselves, on a distorted picture v'. With scores l on the picture and logits l'
    on v',

        (1 + alpha) * l - alpha * l',   and impossible where l < log(beta) + max l.

    v' is the picture with the noise of step t of a diffusion, sqrt(a_t) v + sqrt(1 - a_t) e with e ~ N(0, 1), added to
    the normalised pixels. Processors and warpers of transformers come after the contrast, as in the official code,
    which acts under sampling only; here the search is free. With `alpha` 0 nothing runs twice and the constraint acts
    alone: the control that tells how much of an effect it has by itself.
    Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding,
    https://arxiv.org/abs/2311.16922.

    Each picture's noise is drawn from a generator of its own, seeded with `seed`, its image's seed and its place among
    the image's pictures: it is the same alone and in any batch.

    Args:
        alpha: weight of the contrast, >= 0.
        beta: how likely a token must be, as a share of the likeliest, to stay possible, in [0, 1]; 0 lets all stay. The
            official scripts use 0.1 and 0.2.
        noise_step: t, 0 to 999. At 500 the picture keeps 0.86 of its size under noise of 0.51, at 999 0.28 under 0.96.
        distortion: `noise`; `blank`, zeros, which is the mid-grey that the processor subtracts; `mean`, each picture's
            mean colour; `blur`, Gaussian.
        blur: standard deviation of `blur`, as a share of the height of a picture (of a tile, where pictures come in
            tiles), > 0.
        distort: any other second branch: a function from the inputs of `generate` (a dict of tensors) to those entries
            that differ in the branch. `distortion` is then not used.
        prunes: what happens to the branch when a decoder prunes the cache. `copied`: the same slots are dropped, so
            that the two still differ in the picture alone and stay equally long; `own`: the branch prunes by its own
            attention.
        seed: of the noise, together with each image's seed.

    Raises:
        StackError: for a value out of range, inputs without pictures, or prompts whose pictures cannot be told apart.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    distortion: str = "noise"
    blur: float = 0.05
    distort: Callable[[dict], dict] | None = None
    prunes: str = "copied"
    seed: int = 0

    def __post_init__(self):
        check_number(self, "alpha", 0)
        check_number(self, "beta", 0, 1)
        check_number(self, "blur", 0, above=True)
        check_integer(self, "noise_step", 0, _STEPS - 1)
        check_integer(self, "seed")
        for name, known in _CHOICES.items():
            check_choice(self, name, known)
        if self.distort is not None and not callable(self.distort):
            raise StackError(
                f"vcd: distort is a function from the inputs to the branch's, not {self.distort!r}; the named"
                f" distortions are distortion={'|'.join(_CHOICES['distortion'])}"
            )

    def requirements(self, model: Any) -> Requirements:
        if self.alpha == 0:
            return Requirements()
        return Requirements(
            branch=Branch(
                inputs=lambda given: self.distorted(given.tensors, given.seeds, given.model.config),
                pruning=_PRUNING[self.prunes],
            )
        )

    def process_logits(self, step: Step, state: None, scores: Tensor) -> Tensor:
        contrast = scores
        if self.alpha:
            contrast = (1 + self.alpha) * scores - self.alpha * step.branch
            contrast = contrast.masked_fill(scores == -torch.inf, -torch.inf)
        if self.beta:
            contrast = contrast.masked_fill(scores < math.log(self.beta) + scores.amax(-1, keepdim=True), -torch.inf)
        return contrast

    def distorted(self, inputs: dict[str, Tensor], seeds: list[int], config: Any = None) -> dict[str, Tensor]:
        """The entries of the inputs that differ in the branch.

        Args:
            inputs: what `generate` gets.
            seeds: one a prompt, [b].
            config: the model's, which tells how patches make pictures and which tokens stand for them.
        """
        if self.distort is not None:
            return self.distort(inputs)
        pixels = {
            name: value
            for name, value in inputs.items()
            if name.startswith("pixel_values") and value.is_floating_point()
        }
        if not pixels:
            raise StackError(
                "vcd: the inputs hold no picture (no pixel_values). Pass one, or say what the other branch runs on:"
                " VCD(distort=function)"
            )
        return {name: self._pictures(config, name, inputs, seeds, kind) for kind, name in enumerate(sorted(pixels))}

    def _pictures(self, config: Any, name: str, inputs: dict[str, Tensor], seeds: list[int], kind: int) -> Tensor:
        """One entry of the inputs, distorted; `kind` tells pictures and videos apart in the seed."""
        value = inputs[name]
        if self.distortion == "blank":
            return _padded_alike(value, torch.zeros_like(value))
        grids = _grid(name, inputs) if value.ndim == 2 else None
        pixels = value.float()
        pictures = list(pixels if grids is None else pixels.split([math.prod(grid) for grid in grids]))
        if self.distortion == "noise":
            owners = _owners(len(pictures), _sizes(value, grids), _placeholders(config, name, inputs), len(seeds))
            places = [i - owners.index(owner) for i, owner in enumerate(owners)]
            out = [
                noised(picture, _draw(picture, (self.seed, seeds[owner], kind, place)), self.noise_step)
                for picture, owner, place in zip(pictures, owners, places, strict=True)
            ]
        else:
            each: Sequence[list[int] | None] = [None] * len(pictures) if grids is None else grids
            change = mean_colour if self.distortion == "mean" else functools.partial(blurred, share=self.blur)
            out = [
                _as_patches(change(_as_tiles(picture, grid, config)), picture, grid, config)
                for picture, grid in zip(pictures, each, strict=True)
            ]
        return _padded_alike(value, (torch.stack(out) if grids is None else torch.cat(out)).to(value.dtype))


@functools.cache
def alpha_bar() -> Tensor:
    """a_t of the published schedule, [1000]: the share of a picture's variance that is left at step t, counted from
    0.
    """
    betas = torch.linspace(-6, 6, _STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)


def noised(picture: Tensor, noise: Tensor, step: int) -> Tensor:
    """The picture at `step` of the diffusion, for a draw `noise` of its shape."""
    left = float(alpha_bar()[step])
    return math.sqrt(left) * picture + math.sqrt(1 - left) * noise


def mean_colour(tiles: Tensor) -> Tensor:
    """[tiles, colours, height, width], all of the mean colour; tiles of zeros, which are padding, do not count."""
    used = (tiles != 0).flatten(1).any(1).sum().clamp(min=1)
    colour = tiles.sum((0, 2, 3)) / (used * tiles.shape[-2] * tiles.shape[-1])
    return colour[:, None, None].expand_as(tiles)


def blurred(tiles: Tensor, share: float) -> Tensor:
    """[tiles, colours, height, width] under a Gaussian whose standard deviation is `share` of the height; it is cut off
    at the borders.
    """
    height, width = tiles.shape[-2:]
    return _gaussian(height, share * height).to(tiles) @ tiles @ _gaussian(width, share * height).to(tiles).T


def _gaussian(size: int, deviation: float) -> Tensor:
    """Weights [to, from] of a blur along one axis."""
    at = torch.arange(size, dtype=torch.float64)
    return (-((at[:, None] - at) ** 2) / (2 * deviation**2)).softmax(-1)


def _draw(picture: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Standard normal noise of the picture's shape from a generator seeded with `numbers`, tile by tile, so that
    padding tiles change nothing.
    """
    seed = functools.reduce(lambda mixed, number: mixed * 1_000_003 + number, numbers) % 2**63
    generator = torch.Generator().manual_seed(seed)
    tiles = picture.reshape(-1, *picture.shape[-3:])
    return (
        torch.stack([torch.randn(tile.shape, generator=generator) for tile in tiles])
        .reshape(picture.shape)
        .to(picture.device)
    )


def _grid(name: str, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Of patches, [patches, values]: the frames, rows and columns of each picture."""
    key = "video_grid_thw" if name.endswith("videos") else "image_grid_thw"
    if key not in inputs:
        raise StackError(
            f"vcd: {name} holds patches, and without {key} the pictures cannot be told apart; pass all that the"
            " processor returns"
        )
    return inputs[key].tolist()


def _sizes(value: Tensor, grids: list[list[int]] | None) -> list[int] | None:
    """How many placeholder tokens each picture has, up to a common factor; None where that is not known."""
    if grids is not None:
        return [math.prod(grid) for grid in grids]
    return [1] * len(value) if value.ndim == 4 else None


def _placeholders(config: Any, name: str, inputs: dict[str, Tensor]) -> list[int] | None:
    """How many placeholder tokens each prompt has; None where that is not known."""
    kind = "video" if name.endswith("videos") else "image"
    token = hf.placeholder_ids(config).get(kind)
    return None if token is None or "input_ids" not in inputs else (inputs["input_ids"] == token).sum(-1).tolist()


def _owners(count: int, sizes: list[int] | None, tokens: list[int] | None, rows: int) -> list[int]:
    """The prompt that each picture belongs to: by the placeholder tokens where those tell, else as many pictures to
    every prompt.
    """
    if sizes is not None and tokens is not None and sum(tokens) > 0:
        whole, all_tokens = sum(sizes), sum(tokens)
        starts = [start * all_tokens for start in itertools.accumulate(sizes, initial=0)]
        ends = [end * whole for end in itertools.accumulate(tokens)]
        if set(ends) <= set(starts):
            return [sum(end <= start for end in ends) for start in starts[:-1]]
    if count % rows:
        raise StackError(
            f"vcd: {count} pictures for {rows} prompts, in different numbers, cannot be told apart; pass these prompts"
            " one at a time"
        )
    return [i // (count // rows) for i in range(count)]


def _padded_alike(before: Tensor, after: Tensor) -> Tensor:
    """Of tiles, [pictures, tiles, colours, height, width], those of zeros are padding, by which some models know it:
    they stay so, and no other becomes one.
    """
    if before.ndim < 5:
        return after
    used = (before != 0).flatten(-3).any(-1)[..., None, None, None]
    return after.masked_fill(after == 0, 1e-6).masked_fill(~used, 0)


def _as_tiles(picture: Tensor, grid: list[int] | None, config: Any) -> Tensor:
    """A picture as [tiles or frames, colours, height, width]."""
    if grid is not None:
        return rearrange(picture, "(t h w i j) (c s p q) -> (t s) c (h i p) (w j q)", **_layout(grid, config))
    if picture.ndim < 3:
        raise StackError(
            "vcd: these pictures come as patches in an order that is not known, which cannot be averaged or blurred;"
            " use distortion='noise' or 'blank'"
        )
    return picture.reshape(-1, *picture.shape[-3:])


def _as_patches(tiles: Tensor, picture: Tensor, grid: list[int] | None, config: Any) -> Tensor:
    """Tiles as the picture came, `_as_tiles` undone."""
    if grid is None:
        return tiles.reshape(picture.shape)
    return rearrange(tiles, "(t s) c (h i p) (w j q) -> (t h w i j) (c s p q)", **_layout(grid, config))


def _layout(grid: list[int], config: Any) -> dict[str, int]:
    """Lengths of the axes of patches: those merged into one token stand together."""
    vision = config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    return dict(
        t=grid[0],
        h=grid[1] // merge,
        w=grid[2] // merge,
        i=merge,
        j=merge,
        s=vision.temporal_patch_size,
        p=patch,
        q=patch,
    )
