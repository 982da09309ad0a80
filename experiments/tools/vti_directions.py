"""Make the directions that the decoder `vti` needs: `python -m experiments.tools.vti_directions model=NAME out=FILE`.

Options are words, as run.py's:

  model=llava15_7b                 a model, and model.OPTION=VALUE; the embedded one by default
  out=FILE.safetensors             where the directions go; then decoder.vti.directions=FILE.safetensors
  demos=FILE.jsonl                 demonstrations, a JSON line each: image (a file, looked for from the folder of
                                   FILE.jsonl), value (a true caption), h_value (the same with hallucinated objects)
                                   and question. Without it they are made of rendered scenes: for the embedded model
  count=70                         demonstrations that are drawn
  trials=50                        times that each picture is blanked
  share=0.99                       of a picture's patches that are blanked
  alpha_image=0.9                  strength at which the vision tower is steered while the text directions are made, as
                                   it will be when they are used; 0 leaves the vision directions out
  places=own                       or published: how vision directions are grouped for their principal parts
  seed=42                          of the draws

Models that see pictures at their own resolution get directions of the text alone. For those of the vision tower all
differences are kept in memory: 4 GB for 70 pictures of LLaVA-1.5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import hydra
import torch
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track
from torch import Tensor

from baselines import VTI
from baselines.vti_directions import Directions, text_directions, vision_directions
from decoders import StackError, hf
from decoders.errors import choices

from .. import models
from ..cli.arguments import check
from ..inputs import conf_files
from ..inputs.conf_files import Foreign
from ..inputs.errors import InputError, say
from . import demonstrations

PLACES = ("own", "published")


@dataclass
class Options:
    """Of this command, besides the model's."""

    out: str = "directions.safetensors"
    demos: str | None = None
    count: int = 70
    trials: int = 50
    share: float = 0.99
    alpha_image: float = 0.9
    places: str = "own"
    seed: int = 42


def parse(arguments: Sequence[str]) -> tuple[Options, DictConfig]:
    """The options, and the model's entry.

    Raises:
        InputError: for a word that is none, and for values out of range.
    """
    own = [field.name for field in fields(Options)]
    mine, models_words = [], []
    for word in arguments:
        name, equals, _ = word.partition("=")
        if not equals or (name not in own and name.split(".")[0] != "model"):
            raise InputError(choices(name, [*own, "model"], "option") + " Write it as option=value.")
        (mine if name in own else models_words).append(word)
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(mine)))
        check(models_words, writes=False)
        Plugins.instance().register(Foreign)
        with hydra.initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
            model = hydra.compose("run", models_words).model
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        raise InputError(f"these options cannot be: {str(error.__cause__ or error).splitlines()[0]}") from error
    assert isinstance(options, Options)
    for wrong, rule in (
        (options.count < 2, "count is at least 2"),
        (options.trials < 1, "trials is at least 1"),
        (not 0 < options.share <= 1, "share is more than 0 and at most 1"),
        (options.alpha_image < 0, "alpha_image is at least 0"),
        (options.seed < 0, "seed is at least 0"),
    ):
        if wrong:
            raise InputError(rule)
    if options.places not in PLACES:
        raise InputError(choices(options.places, PLACES, "places"))
    return options, model


def make(model: Any, processor: Any, options: Options, template: str | None, console: Console) -> Directions:
    """The directions of a model, of the demonstrations that the options name.

    Args:
        template: the prompt format, as in `models.encode`.
    """
    found = (
        demonstrations.draw(options.count, options.seed)
        if options.demos is None
        else demonstrations.read(options.demos, options.count, options.seed)
    )
    prompts = []
    for one in track(found, f"{len(found)} demonstrations", console=console):
        try:
            picture = one.picture.open()
        except OSError as error:
            raise InputError(f"the picture '{one.picture.id}' cannot be read: {error}") from error
        prompts.append(models.encode(processor, [picture], one.question, model.device, template))
    vision = None
    if options.alpha_image and hf.sees_any_size(model):
        console.print(
            f"{type(model).__name__} sees pictures at their own resolution: no directions of its vision tower"
        )
    elif options.alpha_image:
        pictures = [tile for prompt in prompts for tile in prompt["pixel_values"].flatten(0, -4)]
        console.print(f"{len(pictures)} pictures, each blanked {options.trials} times")
        by_place = options.places == "own"
        vision = vision_directions(model, pictures, options.share, options.trials, options.seed, by_place)
    width = hf.width(hf.inner_language_model(model))
    before = Directions(torch.zeros(hf.num_layers(hf.inner_language_model(model)), width), vision)
    pairs = [
        (with_answer(prompt, processor.tokenizer, one.true), with_answer(prompt, processor.tokenizer, one.hallucinated))
        for prompt, one in zip(prompts, found, strict=True)
    ]
    steering = VTI(before, alpha_text=0, alpha_image=0 if vision is None else options.alpha_image)
    with steering.encoding_context(model):
        return Directions(text_directions(model, pairs), vision)


def with_answer(prompt: dict[str, Tensor], tokenizer: Any, answer: str) -> dict[str, Tensor]:
    """The inputs of one prompt, with an answer behind it."""
    said = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(prompt["input_ids"].device)
    more = {"input_ids": said, "attention_mask": torch.ones_like(said)}
    more |= {name: torch.zeros_like(said) for name in hf.TOKEN_KINDS & prompt.keys()}
    return prompt | {name: torch.cat([prompt[name], tensor], 1) for name, tensor in more.items()}


def main(arguments: Sequence[str]) -> int:
    console = Console(stderr=True)
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options, config = parse(arguments)
        model, processor = models.load(config)
        made = make(model, processor, options, models.template(config), console)
    except (InputError, StackError) as error:
        return say(error)
    except KeyboardInterrupt:
        return 130
    told = {name: str(getattr(options, name)) for name in ("demos", "count", "trials", "share", "alpha_image", "seed")}
    made.save(options.out, {**told, "places": options.places, "model": str(config.path)})
    shapes = ", ".join(f"{name}={size}" for name, size in made.shapes.items())
    console.print(
        f"{options.out}: {shapes}; sha256 {made.checksum[:12]}", markup=False, highlight=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
