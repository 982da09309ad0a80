"""What the scenes models learn by: sight, the words of what owns a patch, and speech, the words of an answer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch, Data, Words


def features(model, pixels: Tensor) -> Tensor:
    """What the language model is given for each patch, [b, visual, d]."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])


def named(hidden: Tensor, model, group: tuple[Tensor, Tensor], classes: Tensor) -> Tensor:
    """Cross-entropy of the words of `classes` [n] among their group's, from `hidden` [n, d]; [n]."""
    tokens, target = (t.to(hidden.device) for t in group)
    scores = F.linear(hidden, model.get_input_embeddings().weight[tokens].to(hidden.dtype)).float().log_softmax(-1)
    return -(target[classes] * scores).sum(-1)


def sight(model, words: Words, hidden: Tensor, owners: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the words (`data.Words`) for what `owners` [n, 5] describes, read from `hidden` [n, d]; and its parts."""
    there = owners[:, 0] >= 0
    weight = torch.where(there, 1.0, 0.3)
    parts = {
        "names": (named(hidden, model, words.groups[0], owners[:, 0]) * weight).sum() / weight.sum()
    }  # -1: the full stop, the last
    for name, group, classes in zip(
        ("rows", "columns", "colours", "sizes"), words.groups[1:], owners.T[1:], strict=True
    ):
        known = there & (classes >= 0)
        parts[name] = named(hidden[known], model, group, classes[known]).sum() / known.sum().clamp(min=1)
    return parts["names"] + 0.4 * (parts["rows"] + parts["columns"]) + 0.2 * (parts["colours"] + parts["sizes"]), parts


def sight_loss(
    model, data: Data, ids: np.ndarray, done: float, variant: int, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of sight, of the images of these scenes; the words are read from `scale` times the features."""
    pixels, owners = data.see(ids, model.device)
    return sight(model, data.words, scale * features(model, pixels).flatten(0, 1), owners.flatten(0, 1))


def with_images(model, tokens: Tensor, seen: Tensor) -> Tensor:
    """Embeddings of the tokens, [b, T, d], with what was seen, [b, visual, d], in place of the visual ones."""
    embeds = model.get_input_embeddings()(tokens)
    visual = tokens == model.config.image_token_id
    return embeds.masked_scatter(visual[..., None], seen.to(embeds.dtype))


def words_loss(model, words: Words, hidden: Tensor, b: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the tokens that are to be learnt, those that say something of the image twice as heavy; and its parts."""
    target = b.tokens[:, 1:][b.learn[:, 1:]]
    each = F.cross_entropy(model.lm_head(hidden[:, :-1][b.learn[:, 1:]]).float(), target, reduction="none")
    heavy = torch.isin(target, words.heavy.to(target.device))
    weight = torch.where(heavy, 2.0, 1.0)
    return (each * weight).sum() / weight.sum(), {"words": each.mean(), "grounded": each[heavy].mean()}
