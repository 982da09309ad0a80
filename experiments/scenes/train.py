"""Train the embedded model from scratch: `python -m experiments.scenes.train`. The shipped weights: `--seed 1 --out
experiments/scenes/model`.

Two stages, on scenes that are rendered on the spot. (1) Sight: each visual position, as the language model is given it,
is to hold the words of the object that owns its patch: its name, place, colour and size. (2) Speech: the whole model
learns true captions and answers; one image prefix serves several texts, kept apart by a block mask. Auxiliary losses,
faded out, ask for the same words at visual positions in the last layer, and, in the middle layer, where a text names an
object of which there is one. Muon for the matrices, AdamW for the rest. bfloat16 where the machine multiplies it fast.
Checkpoints are written every minute; started again, training resumes, and ends in the same weights.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import architecture
from .language import PROMPTS, about, caption, existence
from .training.arguments import positive, run, shared
from .training.data import Data, Format, recipe, rendered, scene
from .training.losses import features, sight, sight_loss, with_images, words_loss
from .training.stages import Optimizers, Stage, compile_layers
from .world import CATEGORIES, PATCH, SIZE

MODEL = Path(__file__).parent / "model"
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else"
    " %}{{ c.text }}{% endif %}{% endfor %}{% if m.role == 'user' %} {% else %}</s>{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIDE = SIZE // PATCH
IMAGES = 40000


def form(processor: LlavaProcessor) -> Format:
    return Format(processor.tokenizer, "USER: ", "\n", "{prompt} ASSISTANT:", " {answer}", SIDE, SIZE, text=248)


def build_processor() -> LlavaProcessor:
    """A byte-level BPE tokenizer trained on captions and questions, in a LlavaProcessor."""
    texts = [
        f" {existence(n, there).text} {existence(n, there).sentence}" for n in CATEGORIES for there in (True, False)
    ] * 20
    for i in range(5000):
        s = scene(i)
        texts += [f"USER: \n{p} ASSISTANT: {caption(s, kind)}" for kind, prompts in PROMPTS.items() for p in prompts]
        texts += [f" {q.text} {q.sentence}" for q in about(s)[:4]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=1024,
    )
    return architecture.processor(fast, TEMPLATE, SIZE, PATCH)


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ids,
    )
    model = architecture.llava(text, processor.tokenizer.convert_tokens_to_ids("<image>"), SIZE, PATCH)
    for layer in model.model.language_model.layers:
        recall(layer.self_attn)
    return model


@torch.no_grad()
def recall(attention) -> None:
    """Let half of the heads begin as a memory: queries and keys are the same function, so that like attends to like,
    and what is found is copied.

    To say where a cup is, a head must look from the word to the patches that hold the same word, and bring along what
    else they hold. From a random start, that is learnt late.
    """
    half = attention.q_proj.weight.shape[0] // 2
    attention.k_proj.weight[:half] = attention.q_proj.weight[:half]
    attention.o_proj.weight[:, :half] = attention.v_proj.weight[:half].T


def speech_loss(model, data: Data, ids: np.ndarray, done: float, variant: int) -> tuple[Tensor, dict[str, Tensor]]:
    b = data.batch(ids, variant, model.device)
    seen = features(model, b.pixels)
    visual = b.tokens == model.config.image_token_id
    out = model.model.language_model(
        inputs_embeds=with_images(model, b.tokens, seen),
        attention_mask=b.mask,
        position_ids=b.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    hidden, middle = (
        out.last_hidden_state,
        model.model.language_model.norm(out.hidden_states[len(out.hidden_states) // 2]),
    )
    loss, said = words_loss(model, data.words, hidden, b)
    owners = b.owners.flatten(0, 1)
    seeing, _ = sight(model, data.words, seen.flatten(0, 1), owners)
    fade = 0.4 * max(0.0, 1 - done / 0.6)
    told = b.named[..., 0] >= 0
    found, parts = sight(model, data.words, middle[told], b.named[told]) if fade else (0.0, {})
    inner = sight(model, data.words, hidden[visual], owners)[0] if fade else 0.0
    return loss + 0.2 * seeing + fade * (inner + found), {
        **said,
        "sight": seeing,
        **{f"told {k}": v for k, v in parts.items() if k != "names"},
    }


def train(args: argparse.Namespace) -> float:
    """Render, train both stages, save the model into `args.out`; returns seconds of training."""
    work = rendered(args.work)
    stages = f"{args.sight_steps}x{args.sight_batch}-{args.speech_steps}x{args.speech_batch}"
    folder = work / f"seed{args.seed}-{args.images}x{args.variants}-{stages}-{args.precision}-{recipe(__file__)}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (work / "processor").exists():
        partly = work / f"processor.{os.getpid()}"
        build_processor().save_pretrained(partly)
        partly.replace(work / "processor")
    processor = AutoProcessor.from_pretrained(work / "processor")
    data = Data(work, args.images, args.variants, form(processor), args.processes)
    torch.manual_seed(args.seed)
    model = build_model(processor).to(args.device).train()
    if args.compile:
        compile_layers([*model.model.language_model.layers, *model.model.vision_tower.encoder.layers])
    seconds = 0.0
    for name, loss, optimizers in (
        ("sight", sight_loss, lambda: Optimizers(model, {"language_model.layers": 0.0}, 0.02, 2e-3)),
        ("speech", speech_loss, lambda: Optimizers(model, {"vision_tower": 0.2}, 0.014, 1.5e-3)),
    ):
        stage = Stage(
            name,
            partial(loss, model, data),
            getattr(args, f"{name}_steps"),
            getattr(args, f"{name}_batch"),
            args.seed,
            args.precision == "bf16",
            args.save_every,
        )
        seconds += stage.run(model, optimizers(), data.count, data.variants, folder)
    model.eval().to(torch.float16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    return seconds


def main() -> None:
    parser = shared(__doc__.split("\n\n")[0], images=IMAGES, sight=(1000, 32), speech=(2000, 16), seed=0)
    parser.add_argument("--variants", type=positive, default=2, help="wordings of each picture's texts, one an epoch")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the weights; without it, outputs/scenes-seeds/seedN"
    )
    args = parser.parse_args()
    args.out = args.out or Path(f"outputs/scenes-seeds/seed{args.seed}")
    seconds = run(train, args)
    print(
        f"trained in {seconds / 60:.1f} minutes; weights in {args.out}; measure them: python -m"
        f" experiments.scenes.evaluate --model {args.out}"
    )


if __name__ == "__main__":
    main()
