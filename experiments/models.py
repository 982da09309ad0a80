"""Load a vision-language model and its processor, and make its inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def load(config):
    """The model and processor of a `conf/model` entry.

    Raises:
        InputError: if the model cannot be reached; says what to do offline.
    """
    path = str(ROOT / config.path) if (ROOT / config.path).is_dir() else config.path
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    common = dict(trust_remote_code=config.trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(path, **common)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation, **common)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"could not load the model '{config.path}': {first}\n"
            "Offline: download it where there is a network (hf download NAME --local-dir FOLDER), copy the folder here and give model.path=FOLDER.\n"
            "The embedded model needs no download: model=scenes."
        ) from error
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def encode(processor, images: list, prompt: str, device):
    """Inputs of one batch: each image with the prompt, in the model's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[[i] for i in images], text=[text] * len(images), padding=True, return_tensors="pt").to(device)
