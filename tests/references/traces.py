"""Traces of the official implementations (tests/golden), and how our models are fed the same."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

FOLDER = Path(__file__).resolve().parents[1] / "golden"


@functools.cache
def trace(name: str) -> dict:
    """The content of `name`.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@functools.cache
def model(name: str) -> LlamaForCausalLM:
    """Tiny LLaMA A or B; cases name their own EOS."""
    net = LlamaForCausalLM.from_pretrained(FOLDER / "tiny_llama" / name, attn_implementation="sdpa").eval()
    for config in (net.config, net.generation_config):
        config.eos_token_id = None
    return net


@functools.cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "tiny_llama" / name / "inputs.safetensors")


def embeds(name: str, prompt: int, kind: str = "prompt") -> torch.Tensor:
    """[1, 40, d]; `kind` is prompt, or prompt_cd for the distorted picture."""
    return tensors(name)[f"p{prompt}.{kind}"][None]


def ids(name: str, prompt: int) -> torch.Tensor:
    """The text alone, [1, 16]."""
    return torch.cat([tensors(name)[f"p{prompt}.pre"], tensors(name)[f"p{prompt}.post"]])[None]


def visual_mask() -> torch.Tensor:
    """Visual tokens are positions 6 to 29 of 40."""
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 6:30] = True
    return mask
