"""Train what `model=scenes_smol` adds to SmolLM2: `python -m experiments.scenes.smol.train`.

Two stages, on scenes that are rendered on the spot. (1) Sight: the vision tower, which begins as the embedded model's,
stretched to 24 x 24 patches, and the projector learn to give the language model, at each patch, the words of the object
that owns it: its name, place, colour and size. (2) Speech: LoRA on every matrix of the language model (Hu et al. 2021),
with the tower and the projector at a lower rate, on true captions and answers; one image serves several texts, kept
apart by a block mask. Most steps show a random quarter of an image's visual tokens, at their own positions, which costs
a third; the last steps show all. AdamW for LoRA, Muon for other matrices. Checkpoints are written every minute; started
again, training resumes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import is_peft_available

from ...inputs.errors import InputError
from ..training.arguments import positive, run, shared
from ..training.data import Batch, Data, Format, recipe, rendered
from ..training.losses import features, sight, sight_loss, with_images, words_loss
from ..training.stages import Optimizers, Stage, compile_layers
from . import assemble

EMBEDDED = Path(__file__).parents[1] / "model" / "model.safetensors"
SCALE = 3.0  # visual tokens are to be about as long as words, which are 3.2 on average
ALL_FROM = 0.93  # from here on, steps show all visual tokens


def form(tokenizer) -> Format:
    asked = "{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return Format(tokenizer, "<|im_start|>user\n", "\n", asked, "{answer}", assemble.SIDE, assemble.PIXELS, text=288)


@torch.no_grad()
def stretch(tower) -> None:
    """Let the tower begin as the embedded model's: its patches and its grid of positions resized, its layers as they
    are.
    """
    start = "vision_tower."
    own = {k[k.index(start) + len(start) :]: v.float() for k, v in load_file(EMBEDDED).items() if start in k}
    patches, places = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    small = own[patches].shape[-1]
    own[patches] = F.interpolate(own[patches], (assemble.PATCH,) * 2, mode="bicubic") * (small / assemble.PATCH) ** 2
    side = round((len(own[places]) - 1) ** 0.5)
    grid = rearrange(own[places][1:], "(h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, (assemble.SIDE,) * 2, mode="bicubic")
    own[places] = torch.cat([own[places][:1], rearrange(grid, "1 d h w -> (h w) d")])
    tower.load_state_dict(own)


def thinned(b: Batch, visual: Tensor, keep: int) -> tuple[Tensor, Batch]:
    """The batch with `keep` of each row's visual tokens, drawn at random; and which of the visual tokens these are, [b,
    keep].

    Args:
        visual: where the rows' visual tokens are, [n], the same in all rows.
    """
    rows, device = len(b.tokens), b.tokens.device
    picked = torch.rand(rows, len(visual), device=device).argsort(1)[:, :keep].sort(1).values
    first, last = int(visual[0]), int(visual[-1])
    rest = torch.arange(last + 1, b.tokens.shape[1], device=device).expand(rows, -1)
    at = torch.cat([torch.arange(first, device=device).expand(rows, -1), visual[picked], rest], 1)
    mask = b.mask[torch.arange(rows, device=device)[:, None, None], 0, at[:, :, None], at[:, None, :]]
    return picked, Batch(
        b.pixels,
        b.owners,
        b.tokens.gather(1, at),
        b.learn.gather(1, at),
        b.positions.gather(1, at),
        mask[:, None],
        b.named.gather(1, at[..., None].expand(-1, -1, b.named.shape[-1])),
    )


def speech_loss(
    model, data: Data, keep: int, ids: np.ndarray, done: float, variant: int
) -> tuple[Tensor, dict[str, Tensor]]:
    b = data.batch(ids, variant, model.device)
    seen = features(model, b.pixels)
    seeing, parts = sight(model, data.words, SCALE * seen.flatten(0, 1), b.owners.flatten(0, 1))
    if done < ALL_FROM:
        visual = (b.tokens[0] == model.config.image_token_id).nonzero()[:, 0]
        picked, b = thinned(b, visual, keep)
        seen = seen.gather(1, picked[..., None].expand(-1, -1, seen.shape[-1]))
    hidden = model.model.language_model(
        inputs_embeds=with_images(model, b.tokens, seen),
        attention_mask=b.mask,
        position_ids=b.positions,
        use_cache=False,
    ).last_hidden_state
    loss, said = words_loss(model, data.words, hidden, b)
    return loss + 0.2 * seeing, {**said, "names": parts["names"]}


def low_rank(model) -> None:
    """Add LoRA to every matrix of the language model's layers, float32."""
    from peft import LoraConfig, inject_adapter_in_model  # optional: for training alone

    config = LoraConfig(
        r=assemble.RANK,
        lora_alpha=assemble.RANK,
        target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    )
    grad = {name: p.requires_grad for name, p in model.named_parameters()}
    inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        p.requires_grad_(grad.get(name, "lora_" in name))
        if "lora_" in name:
            p.data = p.data.float()


def trained(model) -> dict[str, Tensor]:
    """The delta of a trained model, float16."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.replace(".lora_A.default.weight", ".lora_A").replace(".lora_B.default.weight", ".lora_B")
            found[name] = p.detach().to(torch.float16).contiguous().cpu()
    return found


def train(args: argparse.Namespace) -> float:
    """Render, train both stages, save the delta into `args.out`; returns seconds of training."""
    work = rendered(args.work)
    stages = f"{args.sight_steps}x{args.sight_batch}-{args.speech_steps}x{args.speech_batch}-{args.keep}"
    folder = work / f"smol-seed{args.seed}-{args.images}-{stages}-{args.precision}-{recipe(__file__)}"
    folder.mkdir(parents=True, exist_ok=True)
    data = Data(work, args.images, 1, form(assemble.processor().tokenizer), args.processes)
    torch.manual_seed(args.seed)
    model = assemble.untrained().to(args.device).train()
    stretch(model.model.vision_tower)
    model.model.language_model.requires_grad_(False)  # the output embeddings, too: they are tied
    if args.compile:
        compile_layers(model.model.vision_tower.encoder.layers)
    bf16 = args.precision == "bf16"
    common = {"seed": args.seed, "bf16": bf16, "save_every": args.save_every}
    stage = Stage("sight", partial(sight_loss, model, data, scale=SCALE), args.sight_steps, args.sight_batch, **common)
    seconds = stage.run(model, Optimizers(model, {}, 0.02, 2e-3), data.count, data.variants, folder)
    if bf16:
        model.model.language_model.to(torch.bfloat16)
    low_rank(model)
    if args.compile:
        compile_layers(model.model.language_model.layers)
    slow = {"vision_tower": 0.15, "multi_modal_projector": 0.15}
    stage = Stage(
        "speech", partial(speech_loss, model, data, args.keep), args.speech_steps, args.speech_batch, **common
    )
    seconds += stage.run(model, Optimizers(model, slow, 0.02, 2e-3, 1e-3), data.count, data.variants, folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained(model), args.out)
    args.out.with_suffix(".sha256").write_text(assemble.checksum(args.out) + "\n")
    return seconds


def main() -> None:
    parser = shared(__doc__.split("\n\n")[0], images=16000, sight=(320, 32), speech=(660, 4), seed=1)
    parser.add_argument("--keep", type=positive, default=144, help="visual tokens of an image that most steps show")
    parser.add_argument("--out", type=Path, default=None, help="without it, outputs/scenes-smol/seedN.safetensors")
    args = parser.parse_args()
    args.out = args.out or Path(f"outputs/scenes-smol/seed{args.seed}.safetensors")
    if not is_peft_available():  # else its lack is noticed after the first stage
        parser.error("training needs the package peft: pip install peft")
    try:
        seconds = run(train, args)
    except InputError as error:
        parser.error(str(error))
    print(f"trained in {seconds / 60:.1f} minutes; the delta is {args.out}")


if __name__ == "__main__":
    main()
