"""Every family: a tiny random model of its real class, and inputs made by its real processor class from pictures of
noise.

Prompts are written with `PICTURE` where a picture stands. What needs torchvision (videos, and LFM2-VL's pictures) is
made by hand in the same shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
import transformers as tf
from packaging.version import Version
from PIL import Image

import tiny
from experiments.models import processors
from tiny import builders

PICTURE = "PICTURE"
VOCAB = 200
TEXT = {**tiny.TEXT, "vocab_size": VOCAB, "num_hidden_layers": 4}
SIZE = dict(height=32, width=32)
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IMAGES = dict(
    type="Qwen2VLImageProcessor", patch_size=4, merge_size=2, size=dict(shortest_edge=16 * 16, longest_edge=40 * 40)
)


@dataclass(frozen=True)
class Family:
    """build: the model; processor: the class's name; images: options of its image processor, or None for inputs made by
    hand; tokens: the special tokens, from id 4 on, of which
    the first fills a picture's places; placeholder: what stands for a picture in a prompt; names: attributes of the
    tokenizer; seed: of weights with which answers vary.
    """

    build: Callable[[], Any]
    processor: str
    images: dict | None
    tokens: tuple[str, ...]
    placeholder: str = "<image>"
    options: dict | None = None
    names: dict | None = None
    seed: int = 11


IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)
CROP = dict(size={"shortest_edge": 32}, crop_size=SIZE)
CLIP = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
GRID = dict(image_grid_pinpoints=builders.PINPOINTS)
NEXT = dict(
    processor="LlavaNextProcessor",
    images=dict(type="LlavaNextImageProcessor", **CROP, **GRID),
    tokens=("<image>",),
    options=CLIP,
)
QWEN = dict(images=QWEN_IMAGES, tokens=QWEN_TOKENS, placeholder=QWEN_PICTURE)
IDEFICS = dict(tokens=IDEFICS_TOKENS, options=dict(image_seq_len=4))
SPLIT = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA_NAMES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA_TOKENS = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
AYA_TOKENS = (
    "<|IMG_PATCH|>",
    "<image>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_LINE_BREAK|>",
    "TILE_GLOBAL",
    "TILE_1",
    "TILE_2",
    "TILE_3",
)
GLM_TOKENS = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
TILES = dict(type="GotOcr2ImageProcessor", size=SIZE, crop_to_patches=True, min_patches=1, max_patches=2)

FAMILIES = {
    "llava": Family(
        lambda: builders.llava(TEXT, 4),
        "LlavaProcessor",
        dict(type="CLIPImageProcessor", **CROP),
        ("<image>",),
        options=CLIP,
        seed=21,
    ),
    "instructblip": Family(
        lambda: builders.instructblip(TEXT, 4),
        "InstructBlipProcessor",
        dict(type="BlipImageProcessor", size=SIZE),
        ("<image>",),
        "",
        dict(num_query_tokens=12),
        seed=56,
    ),
    "llava_next": Family(lambda: builders.llava_next(tf.LlamaConfig(**TEXT), 4), **NEXT, seed=39),
    "llava_next_mistral": Family(
        lambda: builders.llava_next(tf.MistralConfig(**TEXT, sliding_window=None), 4), **NEXT, seed=39
    ),
    "llava_onevision": Family(
        lambda: builders.llava_onevision(TEXT, 4, video_token_index=5),
        "LlavaOnevisionProcessor",
        dict(type="LlavaOnevisionImageProcessor", size=SIZE, **GRID),
        ("<image>", "<video>"),
        options=dict(num_image_tokens=16, vision_feature_select_strategy="full"),
        seed=23,
    ),
    "qwen2_vl": Family(lambda: builders.qwen2(TEXT), "Qwen2VLProcessor", **QWEN, seed=12),
    "qwen2_5_vl": Family(lambda: builders.qwen25(TEXT, builders.QWEN_IDS), "Qwen2_5_VLProcessor", **QWEN, seed=29),
    "qwen3_vl": Family(lambda: builders.qwen3(TEXT, builders.QWEN_IDS), "Qwen3VLProcessor", **QWEN, seed=26),
    "internvl": Family(
        lambda: builders.internvl(tf.Qwen3Config(**TEXT, head_dim=12), 4, size=32, tokens=4),
        "InternVLProcessor",
        TILES,
        tuple(
            INTERNVL_NAMES[k] for k in ("context_image_token", "start_image_token", "end_image_token", "video_token")
        ),
        "<IMG_CONTEXT>",
        dict(image_seq_length=4),
        INTERNVL_NAMES,
        seed=18,
    ),
    "smolvlm": Family(
        lambda: builders.idefics("SmolVLM", TEXT),
        "SmolVLMProcessor",
        dict(type="SmolVLMImageProcessor", **SPLIT),
        **IDEFICS,
        seed=12,
    ),
    "idefics3": Family(
        lambda: builders.idefics("Idefics3", TEXT),
        "Idefics3Processor",
        dict(type="Idefics3ImageProcessor", **SPLIT),
        **IDEFICS,
        seed=12,
    ),
    "gemma3": Family(
        lambda: builders.gemma3(TEXT),
        "Gemma3Processor",
        dict(type="Gemma3ImageProcessor", size=SIZE),
        GEMMA_TOKENS,
        "<start_of_image>",
        dict(image_seq_length=16),
        GEMMA_NAMES,
        seed=56,
    ),
    "aya_vision": Family(
        lambda: builders.aya(TEXT),
        "AyaVisionProcessor",
        TILES,
        AYA_TOKENS,
        options=dict(patch_size=8, img_size=32, downsample_factor=2),
        seed=15,
    ),
    "glm4v": Family(
        lambda: builders.glm4v(TEXT),
        "Glm4vProcessor",
        {**QWEN_IMAGES, "type": "Glm4vImageProcessor"},
        GLM_TOKENS,
        "<|begin_of_image|><|image|><|end_of_image|>",
        seed=56,
    ),
    "qwen3_5": Family(lambda: builders.qwen35(TEXT), "Qwen3VLProcessor", **QWEN),
    "lfm2_vl": Family(
        lambda: builders.lfm2(TEXT), "Lfm2VlProcessor", None, ("<image>", "<|image_start|>", "<|image_end|>"), seed=15
    ),
    "florence2": Family(
        lambda: builders.florence2(TEXT),
        "Florence2Processor",
        dict(type="CLIPImageProcessor", image_seq_length=2, **CROP),
        ("<image>",),
        "",
        names={"image_token": "<image>"},
    ),
    "mllama": Family(
        lambda: builders.mllama(TEXT),
        "MllamaProcessor",
        dict(type="MllamaImageProcessor", size=SIZE, max_image_tiles=4),
        ("<|image|>",),
        "<|image|>",
    ),
}
REFUSED = ("florence2", "mllama")
NAMES = [name for name in FAMILIES if name not in REFUSED]
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5")


OLD = Version(transformers.__version__) < Version("5.18")


def mixed_up(inputs: dict) -> bool:
    """Whether transformers mixes up the pictures, or tiles, of one prompt under beams: 5.17 repeats each of them in its
    place, where all of a prompt's belong together.
    """
    pixels = inputs.get("pixel_values")
    return OLD and pixels is not None and pixels.ndim >= 3 and len(pixels) > len(inputs["input_ids"])


@functools.cache
def model(name: str):
    """The family's tiny random model, in float32 evaluation mode."""
    torch.manual_seed(FAMILIES[name].seed)
    net = tiny.lively(FAMILIES[name].build().eval())
    for parameter, value in net.named_parameters():
        if parameter.endswith("_gate"):  # Mllama's, which begin closed
            value.data.fill_(1.0)
    return net


def kind(name: str) -> str:
    """The family's model_type."""
    return model(name).config.model_type


def full(name: str) -> list[int]:
    """The layers whose attention sees the whole prompt; the others slide, or have no attention."""
    text = model(name).config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or [builders.FULL] * text.num_hidden_layers
    return [i for i, kind in enumerate(types) if kind == builders.FULL]


@functools.cache
def processor(name: str):
    """A processor of the family's class, for pictures of 32 pixels."""
    family = FAMILIES[name]
    tokens = {token: i for i, token in enumerate(family.tokens, 4)}
    return processors.synthetic(
        dict(
            type=family.processor,
            image_processor=family.images,
            tokens=tokens,
            names=family.names or {},
            options=family.options or {},
        )
    )


def placeholders(name: str) -> list[int]:
    """Ids of the special tokens, which a forward without a cache would want to fill."""
    return list(range(4, 4 + len(FAMILIES[name].tokens)))


def visual(name: str, inputs: dict) -> torch.Tensor:
    """bool [n, t]: image and video tokens."""
    return torch.isin(
        inputs["input_ids"], torch.tensor([4, *({getattr(model(name).config, "video_token_id", None)} - {None})])
    )


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def words(seed: int, count: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(20, VOCAB, count))


def prompt(seed: int, after: int, *sizes: tuple[int, int]) -> tuple[str, list[Image.Image]]:
    """Three words, a picture of each size with a word behind it, and `after` words; and the pictures."""
    text = [words(seed, 3), *(f"{PICTURE} {words(seed + i, 1)}" for i in range(len(sizes))), words(seed + 50, after)]
    return " ".join(text), [picture(10 * seed + i, *size) for i, size in enumerate(sizes)]


def inputs(name: str, texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """What the family's processor makes of a batch of prompts, padded on the left."""
    family = FAMILIES[name]
    if family.images is None:
        return _by_hand(texts, pictures)
    texts = [text.replace(PICTURE, family.placeholder) for text in texts]
    given = [p for one in pictures for p in one] if name == "instructblip" else pictures
    return dict(
        processors.qformer_on_the_right(processor(name)(images=given, text=texts, padding=True, return_tensors="pt"))
    )


def video(name: str) -> dict[str, torch.Tensor]:
    """A prompt with a video, as the family's processor would make it with torchvision: two or three frames, by time for
    the newer ones.
    """
    g = torch.Generator().manual_seed(5)
    before, after = ([int(w[1:]) for w in words(i, 4).split()] for i in (7, 8))
    if name == "llava_onevision":  # four tokens a frame, and a newline's
        return {
            **_padded([[*before, *[5] * 13, *after]]),
            "pixel_values_videos": torch.randn(1, 3, 3, 32, 32, generator=g),
        }
    if name in ("qwen2_vl", "qwen2_5_vl"):
        frames = [6, *[5] * 12, 7]
    elif name == "glm4v":  # a video is filled by image tokens
        frames = [8, *(i for time in (30, 31) for i in (6, *[4] * 6, 7, time)), 9]
    else:
        frames = [i for time in (30, 31) for i in (time, 6, *[5] * 6, 7)]
    out = {
        **_padded([[*before, *frames, *after]]),
        "pixel_values_videos": torch.randn(48, 96, generator=g),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }
    out["mm_token_type_ids"] = 2 * torch.isin(out["input_ids"], torch.tensor([4, 5])).long()
    return out | ({"second_per_grid_ts": torch.tensor([1.0])} if name == "qwen2_5_vl" else {})


def _by_hand(texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
    """As LFM2-VL's processor, which needs torchvision: patches of 8 pixels, padded to 36 a picture, two by two in one
    token.
    """
    rows, patches, shapes = [], [], []
    for text, images in zip(texts, pictures, strict=False):
        ids, left = [], iter(images)
        for word in text.split():
            if word != PICTURE:
                ids.append(int(word[1:]))
                continue
            image = next(left)
            h, w = (min(6, side // 16 * 2) for side in (image.height, image.width))
            pixels = torch.tensor(np.asarray(image.resize((8 * w, 8 * h))), dtype=torch.float32) / 127.5 - 1
            flat = pixels.view(h, 8, w, 8, 3).transpose(1, 2).reshape(h * w, -1)
            patches.append(torch.nn.functional.pad(flat, (0, 0, 0, 36 - h * w)))
            shapes.append((h, w))
            ids += [5, *[4] * (h * w // 4), 6]
        rows.append(ids)
    mask = torch.tensor([[1] * (h * w) + [0] * (36 - h * w) for h, w in shapes])
    return {
        **_padded(rows),
        "pixel_values": torch.stack(patches),
        "spatial_shapes": torch.tensor(shapes),
        "pixel_attention_mask": mask,
    }


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}
