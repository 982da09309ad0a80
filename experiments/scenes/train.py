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
import hashlib
import json
import math
import os
import shutil
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..metrics import chair
from .kinds import COUNTABLE
from .language import NUMBERS, PROMPTS, about, caption, existence, plural, questions
from .world import CATEGORIES, COLOURS, COLUMNS, PATCH, ROWS, SIZE, Scene, draw, fingerprint, patch_owners, render

MODEL = Path(__file__).parent / "model"
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else"
    " %}{{ c.text }}{% endif %}{% endfor %}{% if m.role == 'user' %} {% else %}</s>{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}ASSISTANT:{% endif %}"
)
PATCHES = (SIZE // PATCH) ** 2
IMAGES = 40000
TEXT = 248  # tokens of text beside each picture
EXTENTS = ("small", "large")


def scene(index: int) -> Scene:
    """The training scene of that index: every fifth is crowded."""
    return draw("train", "crowded" if index % 5 == 4 else "typical", index)


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
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=160,
    )
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
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=256, **ids)
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


# ------------------------------------------------------------------------------------------------- data


def _attributes(s: Scene) -> np.ndarray:
    """Of each thing: category, row, column, colour and size (-1: none); the last stands for nothing; int8 [things + 1,
    5].
    """
    of = [
        (
            CATEGORIES.index(t.name),
            *t.cell,
            list(COLOURS).index(t.colour) if t.colour else -1,
            EXTENTS.index(t.extent) if t.extent else -1,
        )
        for t in s.things
    ]
    return np.array([*of, (-1,) * 5], np.int8)


def _texts(s: Scene, variant: int) -> list[tuple[str, str]]:
    """Prompts and answers of one scene: the long caption, a short one or a list, questions."""
    rng = np.random.default_rng([s.index, variant])
    second = ("short", "list")[(s.index // 5 + variant) % 2]
    return [(PROMPTS[k][int(rng.random() < 0.3)], caption(s, k, variant)) for k in ("detailed", second)] + [
        (q.text, q.sentence) for q in questions(s, 10, variant)
    ]


def _prepare(indices: range, processor: Path, variants: int):
    """Pictures, the attributes of what owns their patches, their texts, packed, and the attributes of what the texts'
    tokens name.
    """
    tokenizer = AutoProcessor.from_pretrained(processor).tokenizer
    pictures, owners = np.empty((len(indices), SIZE, SIZE, 3), np.uint8), np.empty((len(indices), PATCHES, 5), np.int8)
    packed, named = (
        np.zeros((4, len(indices), variants, TEXT), np.int16),
        np.empty((len(indices), variants, TEXT, 5), np.int8),
    )
    for j, i in enumerate(indices):
        s = scene(i)
        attributes = _attributes(s)
        pictures[j], owners[j] = np.asarray(render(s)), attributes[patch_owners(s).ravel()]
        for v in range(variants):
            packed[:, j, v], things = _pack(_texts(s, v), s, tokenizer)
            named[j, v] = attributes[things]
    return pictures, owners, packed, named


def _pack(texts: list[tuple[str, str]], s: Scene, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, number of the text, position, and whether it is to be learnt, [4, TEXT]; and the index of the thing that
    a token names, -1 for none.
    """
    out, things, at = np.zeros((4, TEXT), np.int16), np.full(TEXT, -1), 0
    for number, (prompt, answer) in enumerate(texts, 1):
        asked, said = f"{prompt} ASSISTANT:", f" {answer}"
        encoded = tokenizer(asked + said, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"] + [2], [*encoded["offset_mapping"], (0, 0)]
        length = min(len(ids), TEXT - at)
        if number > 1 and length < len(ids):  # only the first may be cut
            break
        out[0, at : at + length] = ids[:length]
        out[1, at : at + length] = number
        out[2, at : at + length] = np.arange(length)
        out[3, at + len(tokenizer(asked)["input_ids"]) : at + length] = 1
        for m in chair.mentions(asked + said):
            alone = [i for i, t in enumerate(s.things) if t.name == m.category]
            last = next(j for j, (a, b) in enumerate(offsets) if b >= m.end)
            if len(alone) == 1 and last < length:
                things[at + last] = alone[0]
        at += length
    return out, things


class Data:
    """Training scenes, rendered once into `folder` and read from there."""

    def __init__(self, folder: Path, count: int, variants: int, processor: LlavaProcessor, processes: int):
        self.count, self.variants = count, variants
        names = ("pictures", "owners", "texts", "named")
        files = [folder / f"{name}-{count}x{variants}.npy" for name in names]
        if not files[-1].exists():
            shapes = [
                (count, SIZE, SIZE, 3),
                (count, PATCHES, 5),
                (4, count, variants, TEXT),
                (count, variants, TEXT, 5),
            ]
            partly = [f.with_suffix(f".{os.getpid()}") for f in files]
            arrays = [
                np.lib.format.open_memmap(f, "w+", t, s)
                for f, t, s in zip(partly, (np.uint8, np.int8, np.int16, np.int8), shapes, strict=False)
            ]
            chunks = [range(i, min(i + 100, count)) for i in range(0, count, 100)]
            with Pool(processes) as pool, progress() as bar:
                job = bar.add_task("rendering", total=count, note="")
                for chunk, (pictures, owners, packed, named) in zip(
                    chunks,
                    pool.imap(partial(_prepare, processor=folder / "processor", variants=variants), chunks),
                    strict=False,
                ):
                    span = slice(chunk.start, chunk.stop)
                    arrays[0][span], arrays[1][span], arrays[2][:, span], arrays[3][span] = (
                        pictures,
                        owners,
                        packed,
                        named,
                    )
                    bar.advance(job, len(chunk))
            del arrays
            for part, file in zip(partly, files, strict=False):
                part.replace(file)
        self.pictures, self.owners, self.texts, self.named = (np.load(f, mmap_mode="r") for f in files)
        self.prefix = torch.tensor(
            processor.tokenizer("USER: ")["input_ids"]
            + [processor.image_token_id] * PATCHES
            + processor.tokenizer("\n")["input_ids"]
        )
        self.words = Words(processor.tokenizer)

    def see(self, ids: np.ndarray, device) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, SIZE, SIZE] and what owns the patches [b, PATCHES, 5]."""
        pixels = torch.from_numpy(self.pictures[ids]).to(device).permute(0, 3, 1, 2).float() / 255
        return (pixels - 0.5) / 0.25, torch.from_numpy(self.owners[ids]).to(device).long()

    def read(self, ids: np.ndarray, variant: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens [b, T], whether each is to be learnt, positions, the mask [b, 1, T, T]: a text sees the picture and
        itself; and what the tokens name, [b, T, 5].
        """
        tokens, number, position, learn = torch.from_numpy(self.texts[:, ids, variant]).to(device).long()
        n = len(self.prefix)
        front = self.prefix.to(device).expand(len(ids), n)
        number = F.pad(number, (n, 0))
        mask = (number[:, :, None] == number[:, None, :]) | (number[:, None, :] == 0)
        mask[:, :, n:] &= (number[:, None, n:] > 0) | torch.eye(n + TEXT, dtype=torch.bool, device=device)[
            :, n:
        ]  # filling sees itself alone
        mask &= torch.ones_like(mask[0]).tril()
        positions = torch.cat([torch.arange(n, device=device).expand(len(ids), n), n + position], 1)
        named = F.pad(torch.from_numpy(self.named[ids, variant]).to(device).long(), (0, 0, n, 0), value=-1)
        return torch.cat([front, tokens], 1), F.pad(learn, (n, 0)).bool(), positions, mask[:, None], named


class Words:
    """The words that stand for what owns a patch, in the language model's own vocabulary.

    `groups`: for name, row, column, colour and size, the tokens [g] among which one chooses, and the target [classes,
    g]; names of several tokens ask for each of them. The last name is the background's, a full stop. `heavy`: tokens
    that say something of the picture.
    """

    def __init__(self, tokenizer):
        def ids(word: str) -> list[int]:
            return tokenizer(word if word == "." else f" {word}")["input_ids"]

        self.groups = []
        for classes in ([*CATEGORIES, "."], ROWS, COLUMNS, COLOURS, EXTENTS):
            tokens = sorted({i for word in classes for i in ids(word)})
            target = torch.zeros(len(classes), len(tokens))
            for row, word in enumerate(classes):
                target[row, [tokens.index(i) for i in ids(word)]] = 1
            self.groups.append((torch.tensor(tokens), target / target.sum(1, keepdim=True)))
        said = [*CATEGORIES, *map(plural, COUNTABLE)] + [
            *ROWS,
            *COLUMNS,
            *COLOURS,
            *EXTENTS,
            *NUMBERS.values(),
            "Yes",
            "No",
            "above",
            "below",
        ]
        self.heavy = torch.tensor(
            sorted({i for phrase in said for word in phrase.split() if word != "of" for i in ids(word)})
        )


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


# ------------------------------------------------------------------------------------------------- training


class Optimizers:
    """Muon for matrices inside the layers, AdamW for embeddings, biases and norms; warm-up, then cosine to a
    twentieth.
    """

    def __init__(self, model, scales: dict[str, float], lr_muon: float, lr_adam: float):
        groups = {"muon": [], "adam": []}
        for name, p in model.named_parameters():
            scale = next((s for prefix, s in scales.items() if prefix in name), 1.0)
            kind = "muon" if p.ndim == 2 and "embed" not in name and "lm_head" not in name else "adam"
            groups[kind].append({"params": [p], "lr": scale * (lr_muon if kind == "muon" else lr_adam)})
        self.all = [
            torch.optim.Muon(groups["muon"], weight_decay=0.02, adjust_lr_fn="original"),
            torch.optim.AdamW(groups["adam"], weight_decay=0.0, betas=(0.9, 0.97)),
        ]
        self.params = [p for opt in self.all for g in opt.param_groups for p in g["params"]]
        for opt in self.all:
            for g in opt.param_groups:
                g["base"] = g["lr"]

    def step(self, done: float) -> None:
        factor = min(1.0, done / 0.03 + 0.02) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt in self.all:
            for g in opt.param_groups:
                g["lr"] = g["base"] * factor
            opt.step()
            opt.zero_grad(set_to_none=True)


def _features(model, pixels: Tensor) -> Tensor:
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])


def _named(hidden: Tensor, model, group, classes: Tensor) -> Tensor:
    """Cross-entropy of the words of `classes` [n] among their group's, from `hidden` [n, d]; [n]."""
    tokens, target = (t.to(hidden.device) for t in group)
    scores = F.linear(hidden, model.get_input_embeddings().weight[tokens]).float().log_softmax(-1)
    return -(target[classes] * scores).sum(-1)


def _sight(model, data: Data, features: Tensor, owners: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the words for what owners [n, 5] describes, read from features [n, d]; and its parts."""
    there = owners[:, 0] >= 0
    weight = torch.where(there, 1.0, 0.3)
    parts = {
        "names": (_named(features, model, data.words.groups[0], owners[:, 0]) * weight).sum() / weight.sum()
    }  # -1: the full stop, the last
    for name, group, classes in zip(
        ("rows", "columns", "colours", "sizes"), data.words.groups[1:], owners.T[1:], strict=False
    ):
        known = there & (classes >= 0)
        parts[name] = _named(features[known], model, group, classes[known]).sum() / known.sum().clamp(min=1)
    return parts["names"] + 0.4 * (parts["rows"] + parts["columns"]) + 0.2 * (parts["colours"] + parts["sizes"]), parts


def sight_loss(model, data: Data, ids: np.ndarray, done: float, variant: int):
    pixels, owners = data.see(ids, model.device)
    return _sight(model, data, _features(model, pixels).flatten(0, 1), owners.flatten(0, 1))


def speech_loss(model, data: Data, ids: np.ndarray, done: float, variant: int):
    pixels, owners = data.see(ids, model.device)
    tokens, learn, positions, mask, named = data.read(ids, variant, model.device)
    features = _features(model, pixels)
    embeds = model.get_input_embeddings()(tokens)
    visual = tokens == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
    out = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    hidden, middle = (
        out.last_hidden_state,
        model.model.language_model.norm(out.hidden_states[len(out.hidden_states) // 2]),
    )
    target = tokens[:, 1:][learn[:, 1:]]
    each = F.cross_entropy(model.lm_head(hidden[:, :-1][learn[:, 1:]]).float(), target, reduction="none")
    heavy = torch.isin(target, data.words.heavy.to(target.device))
    weight = torch.where(heavy, 2.0, 1.0)
    loss = (each * weight).sum() / weight.sum()
    sight, _ = _sight(model, data, features.flatten(0, 1), owners.flatten(0, 1))
    fade = 0.4 * max(0.0, 1 - done / 0.6)
    told = named[..., 0] >= 0
    found, parts = _sight(model, data, middle[told], named[told]) if fade else (0.0, {})
    inner = _sight(model, data, hidden[visual], owners.flatten(0, 1))[0] if fade else 0.0
    return loss + 0.2 * sight + fade * (inner + found), {
        "words": each.mean(),
        "grounded": each[heavy].mean(),
        "sight": sight,
        **{f"told {k}": v for k, v in parts.items() if k != "names"},
    }


def run_stage(name: str, loss_fn, model, data: Data, optimizers: Optimizers, args, folder: Path) -> float:
    """Train one stage, writing a checkpoint every minute; resumes from it. Returns the seconds spent, earlier ones
    included.
    """
    file, start, spent, mean = folder / f"{name}.pt", 0, 0.0, {}
    steps, batch = getattr(args, f"{name}_steps"), getattr(args, f"{name}_batch")
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=model.device)
        model.load_state_dict(state["model"])
        for opt, s in zip(optimizers.all, state["optimizers"], strict=False):
            opt.load_state_dict(s)
        start, spent, mean = state["step"], state["spent"], state["mean"]
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.cat(
        [torch.randperm(data.count, generator=generator) for _ in range(1 + steps * batch // data.count)]
    ).numpy()
    begin = saved = time.time()
    with progress() as bar, (folder / "log.jsonl").open("a") as log:
        job = bar.add_task(name, total=steps, completed=start, note="")
        for step in range(start, steps):
            at = step * batch
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss, parts = loss_fn(
                    model, data, order[at : at + batch], step / steps, at // data.count % data.variants
                )
            loss.backward()
            optimizers.step(step / steps)
            for key, value in {"loss": loss, **parts}.items():
                mean[key] = 0.98 * mean.get(key, value.item()) + 0.02 * value.item()
            bar.update(job, advance=1, note=" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            if step == steps - 1 or time.time() - saved > args.save_every:
                saved = time.time()
                total = spent + saved - begin
                partly = file.with_suffix(".tmp")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers.all],
                        "step": step + 1,
                        "spent": total,
                        "mean": mean,
                    },
                    partly,
                )
                partly.replace(file)
                print(
                    json.dumps(
                        {
                            "stage": name,
                            "step": step + 1,
                            "seconds": round(total),
                            **{k: round(v, 4) for k, v in mean.items()},
                        }
                    ),
                    file=log,
                    flush=True,
                )
    return spent + time.time() - begin


def _precision(device: str) -> str:
    """bf16 where the machine multiplies it faster than fp32."""
    if device == "cpu":
        return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else "fp32"
    return "bf16" if device != "cuda" or torch.cuda.is_bf16_supported() else "fp32"


def rendered(work: Path) -> Path:
    """The folder for what is made of these scenes, texts and readings."""
    return work / fingerprint(Path(chair.__file__))


def train(args: argparse.Namespace) -> float:
    """Render, train both stages, save the model into `args.out`; returns seconds of training."""
    work = rendered(args.work)
    # checkpoints of other settings or of another recipe are not gone on with
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    sight, speech = f"{args.sight_steps}x{args.sight_batch}", f"{args.speech_steps}x{args.speech_batch}"
    folder = work / f"seed{args.seed}-{args.images}x{args.variants}-{sight}-{speech}-{args.precision}-{code}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (work / "processor").exists():
        partly = work / f"processor.{os.getpid()}"
        build_processor().save_pretrained(partly)
        partly.replace(work / "processor")
    processor = AutoProcessor.from_pretrained(work / "processor")
    data = Data(work, args.images, args.variants, processor, args.processes)
    torch.manual_seed(args.seed)
    model = build_model(processor).to(args.device).train()
    if args.compile:
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            layer.compile()
    seconds = run_stage(
        "sight", sight_loss, model, data, Optimizers(model, {"language_model.layers": 0.0}, 0.02, 2e-3), args, folder
    )
    seconds += run_stage(
        "speech", speech_loss, model, data, Optimizers(model, {"vision_tower": 0.2}, 0.014, 1.5e-3), args, folder
    )
    model.eval().to(torch.float16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    return seconds


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer >= 1, not '{text}'")
    return int(text)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=positive, default=IMAGES)
    parser.add_argument("--variants", type=positive, default=2, help="wordings of each picture's texts, one an epoch")
    parser.add_argument("--sight-steps", type=positive, default=1000)
    parser.add_argument("--sight-batch", type=positive, default=32)
    parser.add_argument("--speech-steps", type=positive, default=2000)
    parser.add_argument("--speech-batch", type=positive, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=device)
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default=_precision(device), help="of the multiplications in training"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=shutil.which("g++") is not None,
        help="compile the layers, which needs a C++ compiler",
    )
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/scenes-training"), help="rendered pictures and checkpoints"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the weights; without it, outputs/scenes-seeds/seedN"
    )
    parser.add_argument("--processes", type=positive, default=2)
    args = parser.parse_args()
    args.out = args.out or Path(f"outputs/scenes-seeds/seed{args.seed}")
    try:
        seconds = train(args)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from the last checkpoint.")
        raise SystemExit(130) from None
    print(
        f"trained in {seconds / 60:.1f} minutes; weights in {args.out}; measure them: python -m"
        f" experiments.scenes.evaluate --model {args.out}"
    )


if __name__ == "__main__":
    main()
