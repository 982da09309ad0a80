"""VTI (ICLR 2025): steer the language model and the vision tower along fixed directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decoders import Decoder, Edits, ForwardView, Requirements, StackError, hf
from decoders.options import check_number

from .steering import turned
from .vti_directions import COMMAND, Directions, check_places, load

_SCALE = 0.1  # of both strengths, as published
_encoding: ContextVar[bool] = ContextVar("_encoding", default=False)  # whether pictures are being steered


@dataclass
class VTI(Decoder):
    """Steer MLP outputs and vision features along directions learned from demonstrations.

    A direction is what true answers have and hallucinated ones have not (text: u_i [d] of each block), and what blanked
    pictures have and whole ones have not (vision: w_i [P, d_v] of each block, a place each). With hat(x) = x / |x|, the
    MLPs return, in place of y,

        hat(hat(y) + 0.1 * alpha_text * hat(u_i)) * |y|     language model, all tokens, the prompt's included
        hat(hat(y) + 0.1 * alpha_image * hat(w_i)) * |y|    vision tower, each place with its own w_i

    Reducing Hallucinations in Large Vision-Language Models via Latent Space Steering,
    https://arxiv.org/abs/2410.15778. Published for LLaVA-1.5: 0.9 and 0.9, of 70 demonstrations, for MMHal; the
    official arguments' defaults are 0.8 and 0.

    Directions belong to a model. `python -m experiments.tools.vti_directions` makes them of one's own captions, or of
    rendered scenes. Otherwise than the official code: a vision direction's principal part is of a place over all layers
    (the command also makes the published grouping), and the model's type is kept. The same push acts on all rows, those
    of branches, beams and candidates included. It costs no forward and no branch.

    Vision directions are of places, so models that see pictures at their own resolution (Qwen-VL, GLM-4V) are refused
    unless `alpha_image` is 0. The vision tower runs before the loop begins, so it is steered by `stack.generate(model,
    ...)` alone, not by `model.generate(custom_generate=stack)`, which is refused.

    Args:
        directions: the file, or `Directions`; needed unless both strengths are 0.
        alpha_text: strength in the language model, >= 0; 0 for none.
        alpha_image: strength in the vision tower, >= 0; 0 for none.

    Raises:
        StackError: for a value out of range, a file that cannot be used, or directions of another model.
    """

    directions: str | Path | Directions | None = None
    alpha_text: float = 0.9
    alpha_image: float = 0.9
    _units: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _checksum: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self):
        check_number(self, "alpha_text", 0)
        check_number(self, "alpha_image", 0)
        if self.directions is not None and not isinstance(self.directions, (str, Path, Directions)):
            raise StackError(f"vti: directions is the name of a file, or Directions, not {self.directions!r}")

    def check_model(self, model: Any) -> None:
        if self.alpha_image:
            self._check_vision(self._found(), model)

    def requirements(self, model: Any) -> Requirements:
        if not self.alpha_text and not self.alpha_image:
            return Requirements(constant_forward=True)
        found = self._found()
        self._check_text(found, model)
        if found.checksum != self._checksum:
            self._units, self._checksum = {}, found.checksum
        return Requirements(edits=Edits(mlp=None) if self.alpha_text else Edits(), constant_forward=True)

    def edit_mlp(self, inputs: Tensor, output: Tensor, view: ForwardView) -> Tensor | None:
        units = self._units.get(output.device)  # [l, d]
        if units is None:  # in the first prompt that runs on this device
            units = self._units[output.device] = F.normalize(self._found().text, dim=-1).to(output.device)
        return turned(output.float(), _SCALE * self.alpha_text * units[view.layer])

    def model_context(self, model: Any) -> AbstractContextManager:
        if self.alpha_image and not _encoding.get():
            raise StackError(
                "vti steers the vision tower, which only stack.generate(model, **inputs, ...) can do; call that in"
                " place of model.generate, or leave the tower as it is with alpha_image=0"
            )
        return nullcontext()

    def encoding_context(self, model: Any) -> AbstractContextManager:
        return self._steering(self._found(), model) if self.alpha_image else nullcontext()

    @contextmanager
    def _steering(self, found: Directions, model: Any) -> Iterator[None]:
        """Within, the vision tower is steered."""
        assert found.vision is not None
        units, handles = F.normalize(found.vision, dim=-1), []  # [L, P, d_v]
        before = _encoding.set(True)
        try:
            for block, unit in zip(hf.vision_blocks(model), units, strict=True):
                handles.append(hf.mlp_of(block).register_forward_hook(self._on_vision(unit)))
            yield
        finally:
            _encoding.reset(before)
            for handle in handles:
                handle.remove()

    def _on_vision(self, unit: Tensor):
        def hook(module, args, output):
            y = hf.first_of(output)
            if y.shape[-2:] != unit.shape:
                raise StackError(
                    f"vti: the directions are of {len(unit)} places of a picture, and this one has {y.shape[-2]};"
                    f" make them for pictures of this size: {COMMAND}"
                )
            push = _SCALE * self.alpha_image * unit.to(y.device)
            return hf.with_first(output, turned(y.float(), push).to(y.dtype))

        return hook

    def _found(self) -> Directions:
        if self.directions is None:
            raise StackError(f"vti: directions is the file of this model's directions; make it: {COMMAND}")
        return self.directions if isinstance(self.directions, Directions) else load(self.directions)

    def _check_text(self, found: Directions, model: Any) -> None:
        own, given = (hf.num_layers(model), hf.width(model)), tuple(found.text.shape)
        if self.alpha_text and own != given:
            raise StackError(
                f"vti: the directions are of a language model of l={given[0]} blocks of width d={given[1]},"
                f" {type(model).__name__} has l={own[0]} of d={own[1]}; make its own: {COMMAND}"
            )

    def _check_vision(self, found: Directions, model: Any) -> None:
        check_places(model)
        if found.vision is None:
            raise StackError("vti: the file has no directions of a vision tower; alpha_image=0 steers the text alone")
        own, (layers, places, width) = (len(hf.vision_blocks(model)), hf.vision_width(model)), found.vision.shape
        if own[0] != layers or own[1] not in (None, width):
            raise StackError(
                f"vti: the directions are of a vision tower of L={layers} blocks of width d_v={width}, that of"
                f" {type(model).__name__} has L={own[0]} of d_v={own[1]}; make its own: {COMMAND}"
            )
        patches = hf.patches(model)
        if patches is not None and places not in (patches, patches + 1):  # a tower may have a class token
            raise StackError(
                f"vti: the directions are of P={places} places of a picture, and {type(model).__name__} cuts one into"
                f" {patches} patches; make its own: {COMMAND}"
            )
