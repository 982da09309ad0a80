"""A plain Llama forward over a tiny LLaVA, written out, for oracles: one row, no padding, no cache, float64.

`forward` recomputes everything; `scores(i, scores)` may replace the attention scores of layer i ([h, q, k], scaled, before the mask),
`attend(i, weights, values)` may see or replace its attention weights ([h, q, k]), `mask(i)` may hide columns of layer i (bool [k] or [q, k], true
where visible; a query always sees itself), `mlp(i, x, out)` may replace what the MLP of layer i returns for its input x ([t, d]).
"""

import torch


def tiny(seed=0, layers=4, image_size=32):
    """A random LLaVA of 4 layers, 4 heads, 2 of keys and values, 16 visual tokens at places 3 to 18, and one input."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    text = dict(
        initializer_range=0.25,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=8,
        ),
        text_config=LlamaConfig(**text),
        image_token_index=5,
        image_seq_length=(image_size // 8) ** 2,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").double().eval()
    ids = torch.tensor([[1, 7, 8] + [5] * (image_size // 8) ** 2 + [9, 10, 11]])
    return model, dict(
        input_ids=ids,
        pixel_values=torch.randn(1, 3, image_size, image_size).double(),
        attention_mask=torch.ones_like(ids),
    )


def features(model, inputs):
    """The projected visual tokens, [visual, d]."""
    out = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    out = getattr(out, "pooler_output", out)
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in out])


def is_visual(model, inputs):
    return inputs["input_ids"][0] == model.config.image_token_id


def embedded(model, inputs, visual_tokens=None):
    """The prompt's embeddings with visual tokens in place, [t, d]."""
    ids, here = inputs["input_ids"][0], is_visual(model, inputs)
    out = model.get_input_embeddings()(ids.masked_fill(here, 0))
    if here.any():
        out = out.clone()
        out[here] = (features(model, inputs) if visual_tokens is None else visual_tokens).to(out)
    return out


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def forward(model, embeds, attend=None, mask=None, mlp=None, scores=None):
    """Outputs of all blocks [l, t, d] (before the final norm), the normed last one [t, d], logits of the last place [v]."""
    lm = model.model.language_model
    config, t = lm.config, len(embeds)
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    cos, sin = (one[0] for one in lm.rotary_emb(embeds[None], torch.arange(t)[None]))
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    x, blocks = embeds, []
    for i, layer in enumerate(lm.layers):
        a = layer.self_attn
        y = layer.input_layernorm(x)
        q, k, v = (p(y).view(t, -1, a.head_dim).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        visible = seen if mask is None or mask(i) is None else seen & (mask(i)[None] | torch.eye(t, dtype=torch.bool))
        raw = q @ k.transpose(1, 2) * a.scaling
        raw = raw if scores is None else scores(i, raw)
        w = raw.masked_fill(~visible, -torch.inf).softmax(-1)
        if attend is not None:
            changed = attend(i, w, v, x)
            w = w if changed is None else changed
        x = x + a.o_proj((w @ v).transpose(0, 1).reshape(t, heads * a.head_dim))
        y = layer.post_attention_layernorm(x)
        out = layer.mlp(y)
        if mlp is not None:
            changed = mlp(i, y, out)
            out = out if changed is None else changed
        x = x + out
        blocks.append(x)
    last = lm.norm(x)
    return torch.stack(blocks), last, model.lm_head(last[-1])


def each_its_own(visual, layer, choose):
    """`attend` and `mask` by which, in the layers from `layer` on, every query sees those visual tokens that it chose in the one before; the prompt's last query chooses for the prompt.

    visual: bool [prompt]; choose: from (place, weight) of the visual tokens, weights averaged over heads, to those seen.
    """
    here, seen = visual.nonzero()[:, 0].tolist(), {}

    def attend(i, w, v, x):
        if i == layer - 1:
            mean, seen["mask"] = w.mean(0), torch.ones(len(x), len(x), dtype=torch.bool)
            for q in range(len(x)):
                row = mean[max(q, len(visual) - 1)]
                kept = {at for at, _ in choose([(at, float(row[at])) for at in here])}
                seen["mask"][q, [at for at in here if at not in kept]] = False

    return dict(attend=attend, mask=lambda i: seen["mask"] if i >= layer else None)


def greedy(model, inputs, max_new_tokens, logits_of):
    """The loop: `logits_of(embeds, step)` gives the scores of the next token; ends after an EOS."""
    eos = model.generation_config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    embeds, tokens = embedded(model, inputs), []
    while len(tokens) < max_new_tokens:
        tokens.append(int(logits_of(embeds, len(tokens)).argmax()))
        if tokens[-1] in eos:
            break
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
    return tokens


def plain(model, inputs, max_new_tokens):
    with torch.no_grad():
        return greedy(model, inputs, max_new_tokens, lambda embeds, step: forward(model, embeds)[2])


def contrast(own, other, alpha, beta):
    """(1 + alpha) own - alpha other, impossible where own is below log beta + its largest; beta 0 cuts nothing."""
    out = (1 + alpha) * own - alpha * other
    return out.masked_fill(own < own.max() + torch.log(torch.tensor(float(beta), dtype=own.dtype)), -torch.inf)
