"""Hooks inside the model's forward: decoders that change hidden states, what MLPs return, and attention scores.

Rows here are sequences of the model's batch. While the prompt runs, the main rows and those of each branch have
forwards of their own; afterwards they stand one after another in the same forward, and each is shown to a decoder by
itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import hf
from .interface import Decoder, Requirements, resolve


@dataclass(eq=False, repr=False)
class ForwardView:
    """A forward, as a decoder's hooks inside it are told of it. m sequences, q tokens each.

    Attributes:
        layer: where: a layer, block or hidden state, counted as in `Edits`.
        branch: 0 for the main rows, j for those of the j-th branch of the stack.
        own: whether it is this decoder's branch.
        pruning: of a branch, its `Branch.pruning`; None for the main rows.
        in_prompt: whether the prompt runs (or what a conversation has grown by).
        is_rerun: whether the prompt's last token runs again (`Decoder.select_slots_after_prefill`).
        visual_tokens: bool [m, q], the visual ones of the prompt's tokens; None in later forwards, and unless some
            decoder asks for `visual`.
        real: bool [m, q], those that are no padding.
        scratch: what this decoder's hooks noted earlier in this forward about these rows; any tensors, by name.
        main_scratch: the same about the main rows.
        model: the model that runs.
    """

    layer: int
    branch: int
    own: bool
    pruning: str | None
    in_prompt: bool
    is_rerun: bool
    visual_tokens: Tensor
    real: Tensor
    scratch: dict[str, Any]
    main_scratch: dict[str, Any]
    model: Any
    _inside: Inside
    _decoder: int

    @property
    def seeds(self) -> list[int]:
        """Of the image of each row, [m]; a decoder's own noise is seeded with it, whatever the batch."""
        each = len(self.real) // len(self._inside.seeds)
        return [seed for seed in self._inside.seeds for _ in range(each)]

    def newest(self, x: Tensor) -> Tensor:
        """Of [m, q, ...], the newest tokens: the prompt's last, later all."""
        return x[:, -1:] if self.in_prompt else x

    def image(self, name: str) -> Tensor | None:
        """[m, ...], what is known of the image of each row: kept while its prompt ran, or from `before_prefill`. Of a
        branch what its own rows kept, else what is known of the main rows.
        """
        known = self._inside.images
        value = known[self._decoder, self.branch].get(name)
        value = known[self._decoder, 0].get(name) if value is None else value
        times = 1 if value is None else len(self.real) // len(value)
        return value if value is None or times == 1 else value.repeat_interleave(times, 0)

    def keep(self, name: str, value: Tensor) -> None:
        """While the prompt runs: note what is to be known of each image, [m, ...], until the generation ends."""
        self._inside.images[self._decoder, self.branch][name] = value

    def export(self, name: str, value: Tensor) -> None:
        """Hand what the newest tokens of the main rows showed, [m, q of them, ...], on to `Step.exported`."""
        if self.branch == 0:
            self._inside.exported[self._decoder, name] = value


@dataclass(eq=False, repr=False)
class AttentionView(ForwardView):
    """The same inside attention; t slots.

    Attributes:
        visual: bool [m, 1, t], the slots that hold visual tokens; None unless some decoder asks for `visual`.
        mask: [m, 1, q, t], added to the scores of the newest queries; -inf hides a slot.
        values: [m, kv heads, t, d].
        module: the attention module of the layer.
        softmax: float32 weights [m, h, q, t] of scores of that shape, as the layer makes them.
    """

    visual: Tensor
    mask: Tensor
    values: Tensor
    module: Any
    softmax: Callable[[Tensor], Tensor]

    @property
    def visible(self) -> Tensor:
        """bool [m, q, t], the slots that each of the newest queries sees."""
        return self.mask[:, 0] > torch.finfo(self.mask.dtype).min / 2

    def hide(self, slots: Tensor, drop: bool = False) -> None:
        """Hide slots, bool [m, q or 1, t], of tokens of the prompt, from all tokens that run, in the layers after this
        one; a token always sees itself.

        Args:
            drop: while the prompt runs, whether the layers after this one drop them once it has; else later tokens see
                them again. Declare `Edits(drops=True)`.
        """
        inside, known = self._inside, self._inside.hidden.get(self.branch)
        if drop and self.in_prompt:
            inside.dropped.append((self.branch, self.layer, slots[:, -1]))
        slots = inside.by_place(slots, self.layer, self.branch)
        inside.hidden[self.branch] = slots if known is None else known.to(slots.device) | slots


@dataclass
class Inside:
    """The hooks inside the forward of a stack's decoders during one generation.

    Attributes:
        decoders, requirements: of the stack.
        own_branch: by decoder, the number of its branch, or None.
        layers: indices of the layers that attend to the whole sequence.
        seeds: of each image.
        model: that runs.
        pruning: of each branch, by `Branch.pruning`.
        images: what is known of each image, by decoder and branch.
        branches: those whose rows are in this forward, in order.
        in_prompt: whether it runs a prompt; is_rerun: its last token again.
        visual: bool [l or 1, m, t], the slots with visual tokens of these rows.
        visual_tokens, real: bool [m, q].
        places: long [l, m, t], the place in the sequence of the token in each slot, where layers keep different tokens
            in a slot; else None.
        prompt: places that the prompt has; tells apart what `places` says of it.
        scratch, hidden, exported: of this forward; what is hidden is bool [m, q or 1, t], or [m, q or 1, prompt + 1] by
            place, false at the last, where there are `places`.
        dropped: what goes once the prompt has run: of a branch, after a layer, slots of the prompt, bool [b, t].
        in_hook: whether a decoder's hook runs: a module that it calls makes nothing of the model's own.
    """

    decoders: Sequence[Decoder]
    requirements: Sequence[Requirements]
    own_branch: Sequence[int | None]
    layers: tuple[int, ...]
    seeds: Sequence[int]
    model: Any
    pruning: Sequence[str] = ()
    images: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    branches: tuple[int, ...] = ()
    in_prompt: bool = False
    is_rerun: bool = False
    visual: Tensor | None = None
    visual_tokens: Tensor | None = None
    real: Tensor | None = None
    places: Tensor | None = None
    prompt: int = 0
    scratch: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    exported: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    dropped: list[tuple[int, int, Tensor]] = field(default_factory=list)
    in_hook: bool = False

    def __post_init__(self) -> None:
        self.images |= {(i, j): {} for i in range(len(self.decoders)) for j in range(len(self.pruning) + 1)}
        self.in_layer: dict[int, list[int]] = {}  # decoders that edit attention there, by index of the layer
        for i, needs in enumerate(self.requirements):
            for layer in resolve(needs.edits.attention, len(self.layers), "attention of layers"):
                self.in_layer.setdefault(self.layers[layer], []).append(i)

    # a forward

    def begin(
        self,
        branches: Sequence[int],
        in_prompt: bool,
        visual: Tensor | None,
        real: Tensor,
        visual_tokens: Tensor | None = None,
        places: Tensor | None = None,
        prompt: int = 0,
    ) -> None:
        """Before a forward of the rows of `branches`: see the attributes."""
        self.branches, self.in_prompt, self.visual = tuple(branches), in_prompt, visual
        self.real, self.visual_tokens = real, visual_tokens
        self.places, self.prompt, self.in_hook = places, prompt, False

    def end(self) -> None:
        """After a forward: another one of the model is none of the loop's."""
        self.branches, self.is_rerun = (), False

    def clear(self) -> None:
        """Forget what was noted in a forward."""
        self.scratch, self.hidden, self.exported = {}, {}, {}

    def acts(self, i: int) -> bool:
        """Whether decoder i acts in this forward."""
        return bool(self.branches) and (self.in_prompt or not self.requirements[i].edits.prompt_only)

    def rows_of(self, branch: int, m: int) -> slice:
        """Of m rows, those of a branch that is in this forward."""
        each, at = m // len(self.branches), self.branches.index(branch)
        return slice(at * each, (at + 1) * each)

    def _fields(self, i: int, layer: int, branch: int) -> dict[str, Any]:
        assert self.real is not None
        mine = self.rows_of(branch, len(self.real))
        return {
            "layer": layer,
            "branch": branch,
            "own": branch > 0 and branch == self.own_branch[i],
            "pruning": self.pruning[branch - 1] if branch else None,
            "in_prompt": self.in_prompt,
            "is_rerun": self.is_rerun,
            "visual_tokens": None if self.visual_tokens is None else self.visual_tokens[mine],
            "real": self.real[mine],
            "scratch": self.scratch.setdefault((i, branch), {}),
            "main_scratch": self.scratch.setdefault((i, 0), {}),
            "model": self.model,
            "_inside": self,
            "_decoder": i,
        }

    def edit(self, i: int, layer: int, x: Tensor, call: Callable[[slice, ForwardView], Tensor | None]) -> Tensor:
        """`x`, [m, ...], with what `call` makes of the rows of each branch."""
        parts, changed = [], False
        self.in_hook = True
        for branch in self.branches:
            mine = self.rows_of(branch, len(x))
            new = call(mine, ForwardView(**self._fields(i, layer, branch)))
            changed |= new is not None
            parts.append(x[mine] if new is None else new.to(x.dtype))
        self.in_hook = False
        if not changed:
            return x
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def edit_attention(
        self,
        layer: int,
        scores: Tensor,
        mask: Tensor,
        values: Tensor,
        module: Any,
        softmax: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The scores of the newest queries, [m, h, q, t], as the decoders leave them.

        Args:
            layer: its index.
            mask: [m, 1, q, t], added to the scores.
            softmax: weights of scores and a mask.
        """
        at = self.layers.index(layer)
        visual = None if self.visual is None else self.visual[at if len(self.visual) > 1 else 0]
        for i in self.in_layer.get(layer, ()):
            if not self.acts(i):
                continue
            parts = []
            for branch in self.branches:
                mine = self.rows_of(branch, len(scores))
                view = AttentionView(
                    **self._fields(i, at, branch),
                    visual=cast(Tensor, None if visual is None else visual[mine, None].to(scores.device)),
                    mask=mask[mine],
                    values=values[mine],
                    module=module,
                    softmax=functools.partial(_with_mask, softmax, mask[mine]),
                )
                new = self.decoders[i].edit_attention(scores[mine], view)
                parts.append(scores[mine] if new is None else new.to(scores.dtype))
            scores = torch.cat(parts) if len(parts) > 1 else parts[0]
        return scores

    def edits_attention(self, layer: int) -> bool:
        """Whether some decoder acts in this forward in the attention of the layer with this index."""
        return any(self.acts(i) for i in self.in_layer.get(layer, ()))

    def by_place(self, slots: Tensor, layer: int, branch: int) -> Tensor:
        """Slots of a layer, bool [m, q, t], of the rows of a branch, as `hidden` has them."""
        if self.places is None:
            return slots
        at = self._prompt_places(layer).to(slots.device)[self.rows_of(branch, len(self.places[layer]))]
        found = slots.new_zeros(*slots.shape[:2], self.prompt + 1).scatter(2, at[:, None].expand_as(slots), slots)
        return F.pad(found[..., :-1], (0, 1))

    def _prompt_places(self, layer: int) -> Tensor:
        """long [m, t], the place in the prompt of the token in each slot of a layer; `prompt` for other slots."""
        assert self.places is not None
        at = self.places[layer]
        return at.masked_fill((at < 0) | (at > self.prompt), self.prompt)

    def hidden_slots(self, layer: int, like: Tensor) -> Tensor | None:
        """bool [m, 1, q or 1, t], the slots that decoders hide in the layer with this index; `like` is [m, ...]."""
        if not self.hidden or layer not in self.layers:
            return None
        q, t = max(x.shape[1] for x in self.hidden.values()), next(iter(self.hidden.values())).shape[2]
        none = torch.zeros((len(like) // len(self.branches), q, t), dtype=torch.bool, device=like.device)
        every = [self.hidden.get(branch, none).to(like.device).expand(-1, q, -1) for branch in self.branches]
        hidden = torch.cat(every) if len(every) > 1 else every[0]
        if self.places is not None:
            at = self._prompt_places(self.layers.index(layer)).to(like.device)
            hidden = hidden.gather(2, at[:, None].expand(-1, q, -1))
        return hidden[:, None]

    def exports(self) -> dict[tuple[int, str], Tensor]:
        """What was exported, [m, q, ...]; zeros for rows of branches."""
        more = len(self.branches) - 1
        return {
            key: value if not more else torch.cat([value, value.new_zeros(len(value) * more, *value.shape[1:])])
            for key, value in self.exported.items()
        }


def _with_mask(softmax: Callable[[Tensor, Tensor], Tensor], mask: Tensor, scores: Tensor) -> Tensor:
    return softmax(scores, mask)


@contextmanager
def editing(model, inside: Inside | None, current: Callable[[], Any]) -> Iterator[None]:
    """Within, forwards of the language model call the decoders' hooks.

    Args:
        inside: None where no decoder has any.
        current: the tap of the generation that runs the model, or None.
    """
    handles: list = []
    count = hf.num_layers(model)

    def listening() -> Inside | None:
        tap = current()
        return None if tap is None or tap.inside is not inside else inside

    try:
        for i, needs in enumerate([] if inside is None else inside.requirements):
            edits, blocks = needs.edits, hf.blocks(model)
            for block in resolve(edits.mlp, count, "the MLP of blocks"):
                handles.append(
                    hf.mlp_of(blocks[block]).register_forward_hook(_on_mlp(listening, i, block), with_kwargs=True)
                )
            for state in resolve(edits.hidden, count + 1, "hidden states"):
                if state:
                    handles.append(blocks[state - 1].register_forward_hook(_on_block(listening, i, state)))
                else:
                    handles.append(
                        hf.text_model(model).register_forward_pre_hook(
                            _on_embeddings(listening, i, model), with_kwargs=True
                        )
                    )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_mlp(listening: Callable[[], Inside | None], i: int, block: int) -> Callable:
    def hook(module, args, kwargs, output):
        inside = listening()
        if inside is None or not inside.acts(i):
            return None
        given, out, decoder = hf.input_of(args, kwargs), hf.first_of(output), inside.decoders[i]
        new = inside.edit(i, block, out, lambda mine, view: decoder.edit_mlp(given[mine], out[mine], view))
        return hf.with_first(output, new)

    return hook


def _on_block(listening: Callable[[], Inside | None], i: int, state: int) -> Callable:
    def hook(module, args, output):
        inside = listening()
        if inside is None or not inside.acts(i):
            return None
        hidden, decoder = hf.first_of(output), inside.decoders[i]
        new = inside.edit(i, state, hidden, lambda mine, view: decoder.edit_hidden_states(hidden[mine], view))
        return hf.with_first(output, new)

    return hook


def _on_embeddings(listening: Callable[[], Inside | None], i: int, model: Any) -> Callable:
    def hook(module, args, kwargs):
        inside = listening()
        if inside is None or not inside.acts(i):
            return None
        embeddings, decoder = hf.embeddings_of(model, args, kwargs), inside.decoders[i]
        new = inside.edit(i, 0, embeddings, lambda mine, view: decoder.edit_hidden_states(embeddings[mine], view))
        if new is embeddings:
            return None
        return hf.with_embeddings(kwargs, embeddings, new)

    return hook
