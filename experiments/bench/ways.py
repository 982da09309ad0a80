"""What the benchmark runs: random models, their inputs, and ways to decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from decoders import Decoder, Stack
from decoders.errors import choices
from experiments import models
from experiments.inputs import conf_files
from experiments.inputs.errors import InputError

from . import peers, sequential

SIZES = {
    "110m": dict(vocab=32000, hidden=768, inner=2048, layers=12, heads=12, pixels=336),
    "tiny": dict(vocab=300, hidden=32, inner=64, layers=4, heads=2, pixels=84),
    "deep": dict(vocab=300, hidden=32, inner=64, layers=32, heads=2, pixels=84),  # for --launches
}
PATCH = 14
STACKS = ("[]", "[prunehal]", "[vcd]", "[dola]", "[deco]", "[opera]", "[opera,prunehal]", "[vcd,prunehal]")


def config(size: str, visual: int | None = None) -> LlavaConfig:
    """Of a LLaVA of one of `SIZES`, whose last token id stands for the image; `visual` tokens, a square, if given."""
    s = SIZES[size]
    side = s["pixels"] // PATCH if visual is None else math.isqrt(visual)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=s["vocab"] - 1,
        vision_feature_layer=-1,
        image_seq_length=side**2,
        tie_word_embeddings=True,
    )


def build(
    size: str = "110m", device: str = "cpu", dtype: torch.dtype = torch.float32, visual: int | None = None
) -> LlavaForConditionalGeneration:
    """A random LLaVA of one of `SIZES`, with so many visual tokens if given, whose answers nothing ends."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(size, visual)).to(device, dtype).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def inputs(model: LlavaForConditionalGeneration, batch: int) -> dict:
    """Prompts of the model's visual tokens and 20 others, and noise for pictures."""
    g = torch.Generator().manual_seed(1)
    image, visual, pixels = (
        model.config.image_token_id,
        model.config.image_seq_length,
        model.config.vision_config.image_size,
    )
    before, after = (torch.randint(3, image, (batch, n), generator=g) for n in (6, 14))
    ids = torch.cat([before, torch.full((batch, visual), image), after], 1).to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, pixels, pixels, generator=g).to(model.device, model.dtype),
    }


def full_size(
    name: str, device: str, dtype: str, attention: str, batch: Sequence[int]
) -> tuple[torch.nn.Module, dict[int, dict]]:
    """A `conf/model` entry with random weights, whose answers nothing ends, and inputs by batch: a picture of noise,
    640 x 480, with the entry's prompt.
    """
    torch.manual_seed(0)
    entry = models.entry(name)
    entry.update({"weights": "random", "device": device, "dtype": dtype, "attn_implementation": attention})
    model, processor = models.load(entry)
    model.generation_config.update(eos_token_id=None, pad_token_id=model.generation_config.pad_token_id or 0)
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    given = {}
    for b in batch:
        encoded = models.encode(processor, [picture] * b, entry.prompt, model.device, models.template(entry))
        given[b] = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in encoded.items()}
    return model, given


@dataclass
class Row:
    """One way to decode.

    Attributes:
        generate: takes the model and what `model.generate` takes.
        stack: that it is of, if any.
        uncompiled: what `generate` is given in addition, so that it compiles nothing.
    """

    generate: Callable
    stack: Stack | None = None
    uncompiled: dict = field(default_factory=dict)


def decoder(name: str, settings: Sequence[str] = ()) -> Decoder:
    """A decoder of `conf/decoder` with the options that its file has.

    Args:
        settings: other options, `NAME.OPTION=VALUE`.

    Raises:
        InputError: for a name or an option that does not exist, or a value that cannot be.
    """
    known = conf_files.files("decoder")
    if name not in known:
        raise InputError(choices(name, known, "decoder"))
    config = OmegaConf.create(conf_files.read("decoder", name)[name])
    for setting in settings:
        of, _, rest = setting.partition(".")
        option, equals, _ = rest.partition("=")
        if of not in known or not equals:
            raise InputError(f"{setting!r} is not NAME.OPTION=VALUE with the name of a decoder")
        if of == name:
            if option not in config:
                raise InputError(choices(option, [k for k in config if k != "_target_"], f"option of {name}"))
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([rest]))
    try:
        return instantiate(config)
    except InstantiationException as error:
        raise InputError(str(error.__cause__)) from error


def stack(name: str, settings: Sequence[str] = ()) -> list[Decoder]:
    """The decoders of a stack that is called as on the command line of run.py: `[opera,prunehal]`."""
    return [decoder(one.strip(), settings) for one in name.strip("[]").split(",") if one.strip()]


def alone() -> list[str]:
    """The empty stack, and each decoder of `conf/decoder` alone."""
    return ["[]", *(f"[{name}]" for name in sorted(conf_files.files("decoder")))]


def rows(
    search: str,
    beams: int,
    compile: bool = False,
    peer: str | None = None,
    capture: bool = False,
    stacks: Sequence[str] = STACKS,
    settings: Sequence[str] = (),
) -> dict[str, Row]:
    """All ways to decode under a search, by name; the first is what the others are measured against.

    Args:
        compile: whether each stack is also run compiled, and transformers with its static cache, which it compiles on a
            GPU (under beams it has none).
        capture: whether each stack is also run as captured CUDA graphs.
        peer: another library whose methods are run as well, one of `peers.PEERS`.
        stacks, settings: as `stack` takes them.
    """
    out = {f"transformers beam-{beams}" if search == "beam" else "transformers": Row(_transformers)}
    if compile and search != "beam":
        static = partial(_transformers, cache_implementation="static")
        out["transformers static"] = Row(static, uncompiled={"disable_compile": True})
    for name in stacks:
        decoders = stack(name, settings)
        eager = Stack(decoders)
        out[name] = Row(eager.generate, eager)
        for mode, asked, label in (("on", compile, "compiled"), ("captured", capture, "captured")):
            if asked:
                graph = Stack(decoders, compile=mode)
                out[f"{name} {label}"] = Row(graph.generate, graph, {"compile": "off"})
    if search == "beam":
        out["opera by C+1 forwards"] = Row(sequential.opera)
    if peer is not None:
        out |= {name: Row(generate) for name, generate in peers.PEERS[peer](search).items()}
    return out


def _transformers(model, **given):
    return model.generate(**given)


def options(search: str, beams: int) -> dict:
    """What `generate` takes for a search."""
    return {
        "greedy": dict(do_sample=False),
        "sampling": dict(do_sample=True),
        "beam": dict(do_sample=False, num_beams=beams),
    }[search]
