"""What the oracles share: embeddings of a prompt with its picture, and logits of a whole sequence of embeddings. Answer tokens that happen to be the image's id stay ordinary."""

import torch


def embedded(model, ids, pixels):
    """[1, prompt, d], as the model itself puts pictures in."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def logits(model, prompt, said):
    """[v] of the next token after the prompt's embeddings and the answer `said`, a list of ids; places count from 0."""
    every = torch.cat([prompt, model.get_input_embeddings()(torch.tensor([said], dtype=torch.long))], 1)
    return model.lm_head(model.model.language_model(inputs_embeds=every, use_cache=False).last_hidden_state[0, -1])
