"""VTI: fixed directions, from demonstrations, on the outputs of all MLPs of the vision tower and of the text model. Greedy."""

import contextlib

import torch
from torch.nn import functional as F

from .plain import embedded, forward, greedy


def component(rows):
    """First right singular vector of centred rows [n, d], signed so that the row with the largest part along it has a positive one."""
    u, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return vh[0] * torch.sign(u[u[:, 0].abs().argmax(), 0])


def text_directions(model, demos):
    """[l, d] of pairs (inputs with the true answer, inputs with the hallucinated one): the last token after each block, the last one normed."""
    rows = []
    for true, false in demos:
        blocks = []
        for one in (true, false):
            all_blocks, normed, _ = forward(model, embedded(model, one))
            first = embedded(model, one)[-1:]
            blocks.append(torch.cat([first, all_blocks[:-1, -1], normed[-1:]]))
        rows.append((blocks[0] - blocks[1]).flatten())
    rows = torch.stack(rows)
    return (rows.mean(0) + component(rows)).view(-1, blocks[0].shape[-1])[1:]


def tower(model):
    out = model.model.vision_tower
    return getattr(out, "vision_model", out)


def blanked(pixels, share, patch, generator):
    """A picture [colours, h, w] with int(share x patches) random patches at its mean colour."""
    out, wide, high = pixels.clone(), pixels.shape[2] // patch, pixels.shape[1] // patch
    for at in torch.randperm(wide * high, generator=generator)[: int(share * wide * high)].tolist():
        y, x = at // wide * patch, at % wide * patch
        out[:, y : y + patch, x : x + patch] = pixels.mean((1, 2))[:, None, None]
    return out


def vision_directions(model, pictures, share=0.99, trials=50, seed=0, by_token=True):
    """[l, places, d] of pictures [colours, h, w]: blanked, averaged over trials, minus whole.

    `by_token`: one component a place, over all layers at once (the clean form). Otherwise rows as published, runs of layers + 1 cells of [layer, place].
    """
    generator, patch, rows = torch.Generator().manual_seed(seed), model.config.vision_config.patch_size, []
    states = lambda one: torch.cat(
        tower(model)(one[None], output_hidden_states=True).hidden_states
    )  # [l + 1, places, d]
    for picture in pictures:
        rows.append(
            torch.stack([states(blanked(picture, share, patch, generator)) for _ in range(trials)]).mean(0)
            - states(picture)
        )
    rows = torch.stack(rows)  # [n, l + 1, places, d]
    n, layers, places, d = rows.shape
    grouped = rows.transpose(1, 2).reshape(n, places, -1) if by_token else rows.reshape(n, places, -1)
    out = grouped.mean(0) + torch.stack([component(grouped[:, place]) for place in range(places)])
    out = out.view(places, layers, d).transpose(0, 1) if by_token else out.view(layers, places, d)
    return out[1:]


def turned(out, direction, alpha):
    return F.normalize(F.normalize(out, dim=-1) + 0.1 * alpha * F.normalize(direction, dim=-1), dim=-1) * out.norm(
        dim=-1, keepdim=True
    )


@contextlib.contextmanager
def seeing(model, directions, alpha):
    hooks = []
    for layer, direction in zip(tower(model).encoder.layers, directions if alpha else ()):
        hooks.append(
            layer.mlp.register_forward_hook(
                lambda module, given, out, direction=direction: turned(out, direction, alpha)
            )
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def oracle(model, inputs, max_new_tokens, text=None, vision=None, alpha_text=0.9, alpha_image=0.9):
    with torch.no_grad(), seeing(model, vision, alpha_image if vision is not None else 0):
        steer = (lambda i, x, out: turned(out, text[i], alpha_text)) if text is not None and alpha_text else None
        return greedy(model, inputs, max_new_tokens, lambda embeds, step: forward(model, embeds, mlp=steer)[2])
