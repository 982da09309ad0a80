"""Tiny random models of every family, whose outputs vary, and inputs for them: the one place where tests get them.

Here are seven families, with inputs of the shapes that their processors make, and next to no cost: `model("llava")` and
`inputs("llava", 2)`. `tiny.families` has all, with inputs made by their real processors.
"""

from __future__ import annotations

import functools

import torch
import transformers as tf

from . import builders

VOCAB, IMAGE, EOS, PAD = 199, 7, 2, 0
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=EOS,
)
VISION = builders.VISION
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=8, vision_start_token_id=9, vision_end_token_id=10)
FAMILIES = {
    "llava": lambda: builders.llava(TEXT, IMAGE),
    "llava_next": lambda: builders.llava_next(tf.LlamaConfig(**TEXT), IMAGE),
    "llava_onevision": lambda: builders.llava_onevision(TEXT, IMAGE),
    "qwen25vl": lambda: builders.qwen25(TEXT, QWEN_IDS),
    "qwen3vl": lambda: builders.qwen3(TEXT, QWEN_IDS),
    "internvl": lambda: builders.internvl(tf.Qwen2Config(**TEXT), IMAGE, size=64, tokens=16),
    "instructblip": lambda: builders.instructblip(TEXT, IMAGE),
}


@functools.cache
def model(family: str, scale: float = 6.0):
    """A tiny random model in float32 evaluation mode; weights are scaled up so that outputs vary and attention is
    uneven.
    """
    torch.manual_seed(sorted(FAMILIES).index(family) + 11)
    return lively(FAMILIES[family]().eval(), scale)


def lively(net, scale: float = 6.0):
    """The model with its weights scaled up, and with the special tokens of these tests."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim >= 2 and "norm" not in name:
                p.mul_(scale if "embed" not in name else scale / 2)
    for config in (net.generation_config, getattr(getattr(net, "language_model", None), "generation_config", None)):
        if config is not None:
            config.update(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=1)
    return net


def inputs(family: str, batch: int = 1, seed: int = 0, ragged: bool = True) -> dict[str, torch.Tensor]:
    """Model inputs of `batch` images; prompts of different lengths, padded on the left, when `ragged`."""
    g = torch.Generator().manual_seed(seed)
    pixels, count, extra = _pixels(family, batch, g)
    rows = []
    for i in range(batch):
        before = torch.randint(20, VOCAB, (3,), generator=g).tolist()
        after = torch.randint(20, VOCAB, (5 + (2 * i if ragged else 0),), generator=g).tolist()
        image = [IMAGE] * count
        if family.startswith("qwen"):
            image = [9, *image, 10]
        rows.append([1, *before, *image, *after])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    if family.startswith("qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": mask, **pixels, **extra}


def _pixels(family: str, batch: int, g: torch.Generator):
    def noise(*shape):
        return torch.randn(*shape, generator=g)

    if family in ("llava",):
        return {"pixel_values": noise(batch, 3, 32, 32)}, 16, {}
    if family == "llava_next":  # base + 2 tiles of 4x4, and a newline token a row: 16 + 4 * (8 + 1)
        return {"pixel_values": noise(batch, 3, 3, 32, 32)}, 52, {"image_sizes": torch.tensor([[32, 64]] * batch)}
    if family == "llava_onevision":
        return {"pixel_values": noise(batch, 3, 3, 32, 32)}, 52, {"image_sizes": torch.tensor([[32, 64]] * batch)}
    if family.startswith("qwen"):
        return {"pixel_values": noise(batch * 64, 96)}, 16, {"image_grid_thw": torch.tensor([[1, 8, 8]] * batch)}
    if family == "internvl":
        return {"pixel_values": noise(batch, 3, 64, 64)}, 16, {}
    q = torch.randint(20, VOCAB, (batch, 4), generator=g)
    return (
        {"pixel_values": noise(batch, 3, 32, 32)},
        12,
        {"qformer_input_ids": q, "qformer_attention_mask": torch.ones_like(q)},
    )


def one(batch: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    """Image `i` of a batch alone, without its padding."""
    n = len(batch["input_ids"])
    row = {k: v[i * (len(v) // n) : (i + 1) * (len(v) // n)] for k, v in batch.items()}
    pad = int((row["attention_mask"] == 0).sum())
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in row:
            row[key] = row[key][:, pad:]
    return row
