"""What `generate` was given, for decoders that run the model on other inputs: branches, and runs before the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import hf
from .errors import StackError
from .inputs import prepare_inputs


@dataclass(frozen=True)
class RawInputs:
    """What `generate` was given.

    Attributes:
        model: the model that the caller named.
        arguments: of `generate`, by name.
        seeds: of each image.
        tokenizer: what the caller gave `stack.generate`: a tokenizer, a processor that has one, or None.
    """

    model: Any
    arguments: dict[str, Any]
    seeds: list[int]
    tokenizer: Any = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors: `input_ids`, `pixel_values`, ..."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def with_changes(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The arguments with these in their place; without those that are None."""
        return {name: value for name, value in {**self.arguments, **changes}.items() if value is not None}

    def without_images(self) -> dict[str, Any]:
        """The changes that take the pictures out: no pixels, and prompts without the image tokens.

        Tokens that mark where a picture begins and ends stay. Prompts are padded on the left anew.

        Raises:
            StackError: where the model cannot run on text alone, or no `input_ids` were given.
        """
        if (why := hf.needs_images(self.model)) is not None:
            raise StackError(f"a prompt without its picture cannot run: {why}")
        return self._prompt([(~visual).nonzero()[:, 0] for visual in self._is_visual()], [], keep_images=False)

    def with_tokens(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The changes that put these ids into every prompt, right after its last image token and what marks the end of
        the picture there, as far as the model's config or the tokenizer names it.

        Raises:
            StackError: where no `input_ids` were given, or a prompt has no picture.
        """
        closing, places = hf.image_end_ids(self.model.config, self.tokenizer), []
        for ids, visual in zip(self._prompts(self._ids()), self._is_visual(), strict=True):
            if not visual.any():
                raise StackError("a prompt has no image tokens, after which the text could be put")
            at = int(visual.nonzero()[-1]) + 1
            while at < len(ids) and int(ids[at]) in closing:
                at += 1
            old = torch.arange(len(ids), device=ids.device)
            places.append(torch.cat([old[:at], old.new_full((len(tokens),), -1), old[at:]]))
        return self._prompt(places, tokens, keep_images=True)

    def with_prompts(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The changes that put these prompts, ids without padding, one an image, in the place of the old ones.

        Raises:
            StackError: where no `input_ids` were given, or a prompt has not the old one's image tokens.
        """
        ids = self._ids()
        rows = [ids.new_tensor(list(prompt)) for prompt in prompts]
        if len(rows) != len(ids):
            raise StackError(f"{len(rows)} prompts were given in the place of {len(ids)}; give one an image")
        for i, (new, old) in enumerate(zip(rows, self._prompts(ids), strict=True)):
            wanted, found = (one[torch.isin(one, self._placeholders())] for one in (old, new))
            if not torch.equal(wanted, found):
                raise StackError(
                    f"prompt {i} holds {len(found)} image tokens and stands in the place of one that holds"
                    f" {len(wanted)}; its pictures are the same, and so are their tokens"
                )
        length = max(map(len, rows))

        def padded(pad: int, values: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(row, (length - len(row), 0), value=pad) for row in values])

        kinds = {
            name: padded(0, [self._kinds_of(row, ids, self.tensors[name]) for row in rows])
            for name in hf.TOKEN_KINDS & self.tensors.keys()
        }
        mask = padded(0, [torch.ones_like(row) for row in rows])
        new = padded(hf.any_pad_id(self.model.config), rows)
        return {**kinds, "position_ids": None, "input_ids": new, "attention_mask": mask}

    @property
    def has_qformer(self) -> bool:
        """Whether a Q-Former was given a text of its own (InstructBLIP), beside the language model's prompt."""
        return hf.QFORMER_IDS in self.tensors

    def with_qformer_tokens(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The changes that put these ids, of the Q-Former's own tokenizer, in the place of the text that it reads."""
        old = self.tensors[hf.QFORMER_IDS]
        ids = old.new_tensor(list(tokens)).repeat(len(old), 1)
        return {hf.QFORMER_IDS: ids, hf.QFORMER_MASK: torch.ones_like(ids)}

    def token_ids(self, text: str, qformer: bool = False) -> list[int]:
        """The ids of a text that is put into a prompt; or of all that a Q-Former reads.

        Raises:
            StackError: where the caller gave no tokenizer for it.
        """
        found = hf.qformer_tokenizer(self.tokenizer) if qformer else hf.text_tokenizer(self.tokenizer)
        if found is None:
            which = "processor, which has the Q-Former's tokenizer, too" if qformer else "tokenizer"
            name = "processor" if qformer else "processor.tokenizer"
            raise StackError(
                f"a text is put into the prompt, which needs the {which}: stack.generate(..., tokenizer={name})"
            )
        return list(found(text, add_special_tokens=qformer)["input_ids"])

    def last_hidden_states(self, changes: dict[str, Any]) -> Tensor:
        """Run the prompts, changed so, through the model as it is, without the decoders.

        Returns:
            float32 [b, l + 1, d]: of each prompt's last token the embedding and the outputs of the l blocks, the last
            one before the final norm.
        """
        one = prepare_inputs(self.model, self.with_changes(changes))
        found: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs: found.append(hf.input_of(args, kwargs)[:, -1].float()), with_kwargs=True
            )
            for block in hf.blocks(one.model)[:1]
        ]
        handles += [
            block.register_forward_hook(lambda module, args, out: found.append(hf.first_of(out)[:, -1].float()))
            for block in hf.blocks(one.model)
        ]
        try:
            hf.prefill(one.model, one.input_ids, one.config, hf.with_cache(one.kwargs, hf.empty_cache(one.model)))
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([x.to(one.input_ids.device) for x in found], 1)

    def _ids(self) -> Tensor:
        """long [b, prompt]"""
        ids = self.tensors.get("input_ids")
        if ids is None:
            raise StackError("the prompt was given without input_ids, so that its tokens cannot be changed")
        return ids

    def _prompts(self, values: Tensor) -> list[Tensor]:
        """Of each prompt, without padding: values of its tokens, from [b, prompt]."""
        return [row[there.bool()] for row, there in zip(values, self._mask(), strict=True)]

    def _mask(self) -> Tensor:
        """[b, prompt], 0 at padding; where none was given, as `generate` infers it of the ids."""
        ids, mask = self._ids(), self.tensors.get("attention_mask")
        if mask is not None:
            return mask
        config = self.arguments.get("generation_config") or self.model.generation_config
        pad, eos = (self.arguments.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()

    def _is_visual(self) -> list[Tensor]:
        """bool [tokens] of each prompt, without padding: its placeholders of pictures."""
        return self._prompts(torch.isin(self._ids(), self._placeholders()))

    def _placeholders(self) -> Tensor:
        """long [modalities], the ids that stand for pictures."""
        return self._ids().new_tensor(list(hf.placeholder_ids(self.model.config).values()))

    def _kinds_of(self, row: Tensor, ids: Tensor, kinds: Tensor) -> Tensor:
        """[t], the kinds of a new prompt's tokens: of placeholders what they are in the old ones, 0 of all others."""
        out = kinds.new_zeros(len(row))
        for token in self._placeholders():
            if (ids == token).any():
                out[row == token] = kinds[ids == token][0]
        return out

    def _prompt(self, places: list[Tensor], tokens: Sequence[int], keep_images: bool) -> dict[str, Any]:
        """The changes that make new prompts.

        Args:
            places: of each, long [tokens], where its tokens stood in the old prompt without padding; -1 for `tokens`.
            keep_images: whether pixels and what belongs to them stay.
        """
        ids, length = self._ids(), max(map(len, places))

        def renew(values: Tensor, pad: int, new: Sequence[int]) -> Tensor:
            out = values.new_full((len(places), length), pad)
            for row, old, at in zip(out, self._prompts(values), places, strict=True):
                row[length - len(at) :] = old[at.clamp(min=0)]
                row[length - len(at) :][at < 0] = values.new_tensor(list(new))
            return out

        pad = hf.any_pad_id(self.model.config)
        changes: dict[str, Any] = {} if keep_images else dict.fromkeys(hf.image_inputs(self.tensors))
        kinds = {name: renew(self.tensors[name], 0, [0] * len(tokens)) for name in hf.TOKEN_KINDS & self.tensors.keys()}
        mask = torch.stack([torch.arange(length, device=ids.device) >= length - len(at) for at in places]).long()
        # positions are the model's to make
        return {**changes, **kinds, "position_ids": None, "input_ids": renew(ids, pad, tokens), "attention_mask": mask}
