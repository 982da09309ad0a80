"""Train the embedded model from scratch: `python -m experiments.scenes.train`.

Two stages, on scenes that are rendered on the spot. (1) Sight: vision tower and projector learn to name the object that
owns each patch, in the language model's own word embeddings. (2) Speech: the whole model learns true captions and yes/no answers;
one image prefix serves several text blocks, kept apart by a block mask; an auxiliary loss, faded out, asks each visual position to name its object.
Muon for the matrices, AdamW for the rest. Checkpoints are written every minute; started again, training resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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

from .language import CAPTION_PROMPT, caption, question, questions
from .world import CATEGORIES, PATCH, SIZE, draw, fingerprint, patch_labels, render

MODEL = Path(__file__).parent / "model"
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'user' %} {% else %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PATCHES = (SIZE // PATCH) ** 2
VARIANTS = 3


def build_processor() -> LlavaProcessor:
    """A byte-level BPE tokenizer trained on captions and questions, in a LlavaProcessor."""
    texts = []
    for i in range(6000):
        scene = draw("train", i)
        texts += [" " + caption(scene), *(f" {t}" for pair in questions(scene, 2) for t in pair)]
    texts += [f" {question(n)} {n}" for n in CATEGORIES] * 20 + [f"USER: \n{CAPTION_PROMPT} ASSISTANT:"] * 2000
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=720, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left", model_max_length=1024)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return LlavaProcessor(images, fast, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1)


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=PATCH, projection_dim=128)
    text = LlamaConfig(vocab_size=len(processor.tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05, **ids)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=PATCHES, tie_word_embeddings=True)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(max_new_tokens=160, **ids)
    return model


def _render(indices: range):
    pictures = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
    labels = np.empty((len(indices), PATCHES), np.int16)
    for j, i in enumerate(indices):
        scene = draw("train", i)
        pictures[j], labels[j] = np.asarray(render(scene)), patch_labels(scene).ravel()
    return pictures, labels


def _texts(indices: range) -> list[list[list[tuple[str, str]]]]:
    """Question and answer pairs of each scene, in `VARIANTS` wordings; the caption comes first."""
    scenes = [draw("train", i) for i in indices]
    return [[[(CAPTION_PROMPT, caption(s, v)), *questions(s, 4, v)] for v in range(VARIANTS)] for s in scenes]


class Data:
    """Rendered training scenes (cached on disk between runs) and their tokenised texts."""

    def __init__(self, folder: Path, count: int, processor: LlavaProcessor, processes: int):
        self.processor, self.count = processor, count
        tokenizer = processor.tokenizer
        self.names = torch.tensor([tokenizer(f" {n}")["input_ids"][0] for n in CATEGORIES] + [tokenizer(".")["input_ids"][0]])
        file, labels, texts = folder / f"pictures-{count}.npy", folder / f"labels-{count}.npy", folder / f"texts-{count}.json"
        chunks = [range(i, min(i + 250, count)) for i in range(0, count, 250)]
        if not labels.exists():
            pictures = np.lib.format.open_memmap(file, "w+", np.uint8, (count, SIZE, SIZE, 3))
            owners = []
            with Pool(processes) as pool, progress() as bar:
                job = bar.add_task("rendering", total=count, note="")
                for chunk, (part, label) in zip(chunks, pool.imap(_render, chunks)):
                    pictures[chunk.start : chunk.stop] = part
                    owners.append(label)
                    bar.advance(job, len(chunk))
            np.save(labels, np.concatenate(owners))
        if not texts.exists():
            with Pool(processes) as pool:
                texts.write_text(json.dumps([row for part in pool.imap(_texts, chunks) for row in part]))
        self.texts = json.loads(texts.read_text())
        self.pictures, self.labels = np.load(file, mmap_mode="r"), torch.from_numpy(np.load(labels).astype(np.int64))

    def pixels(self, ids) -> torch.Tensor:
        x = torch.from_numpy(self.pictures[np.asarray(ids)]).permute(0, 3, 1, 2).float() / 255
        return (x - 0.5) / 0.25

    def patch_words(self, ids) -> torch.Tensor:
        return self.names[self.labels[ids]]  # background is -1: the full stop, last in `names`

    def blocks(self, index: int, variant: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of the caption and of four questions."""
        encode = self.processor.tokenizer
        return [(encode(f"{q} ASSISTANT:")["input_ids"], encode(f" {a}")["input_ids"] + [2]) for q, a in self.texts[index][variant % VARIANTS]]

    def batch(self, ids, variant: int):
        """Tensors of one step: tokens [b, T], labels, positions, bool mask [b, 1, T, T]; the image prefix comes first."""
        prefix = self.processor.tokenizer("USER: ")["input_ids"] + [3] * PATCHES + self.processor.tokenizer("\n")["input_ids"]
        rows = [self.blocks(i, variant) for i in ids.tolist()]
        length = len(prefix) + max(sum(len(q) + len(a) for q, a in row) for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        labels, positions, block = torch.full_like(tokens, -100), torch.zeros_like(tokens), torch.full_like(tokens, -1)
        n = len(prefix)
        tokens[:, :n], positions[:, :n], block[:, :n] = torch.tensor(prefix), torch.arange(n), 0
        for r, row in enumerate(rows):
            at = n
            for b, (q, a) in enumerate(row, 1):
                end = at + len(q) + len(a)
                tokens[r, at:end] = torch.tensor(q + a)
                labels[r, at + len(q) : end] = torch.tensor(a)
                positions[r, at:end], block[r, at:end] = torch.arange(n, n + end - at), b
                at = end
        same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        mask = same & torch.ones(length, length, dtype=torch.bool).tril()
        mask |= torch.eye(length, dtype=torch.bool)
        return tokens, labels, positions, mask[:, None]


class Optimizers:
    """Muon for matrices inside the layers, AdamW for embeddings, biases and norms; warm-up, then cosine to a tenth."""

    def __init__(self, model, scales: dict[str, float], lr_muon: float, lr_adam: float):
        groups = {"muon": [], "adam": []}
        for name, p in model.named_parameters():
            scale = next((s for prefix, s in scales.items() if prefix in name), 1.0)
            kind = "muon" if p.ndim == 2 and "embed" not in name and "lm_head" not in name else "adam"
            groups[kind].append({"params": [p], "lr": scale * (lr_muon if kind == "muon" else lr_adam)})
        self.all = [torch.optim.Muon(groups["muon"], weight_decay=0.02, adjust_lr_fn="original"), torch.optim.AdamW(groups["adam"], weight_decay=0.0, betas=(0.9, 0.97))]
        self.params = [p for opt in self.all for g in opt.param_groups for p in g["params"]]
        for opt in self.all:
            for g in opt.param_groups:
                g["base"] = g["lr"]

    def step(self, done: float) -> None:
        factor = min(1.0, done / 0.03 + 0.02) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt in self.all:
            for g in opt.param_groups:
                g["lr"] = g["base"] * factor
            opt.step()
            opt.zero_grad(set_to_none=True)


def progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))


def _features(model, pixels):
    out = model.model.vision_tower(pixels, output_hidden_states=False)
    return model.model.multi_modal_projector(out.last_hidden_state[:, 1:])


def sight_loss(model, data: Data, ids, _done: float):
    logits = F.linear(_features(model, data.pixels(ids).to(model.device)), model.get_input_embeddings().weight)
    target = data.patch_words(ids).to(model.device)
    weight = torch.where(target == data.names[-1].to(model.device), 0.3, 1.0)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    return (loss * weight).sum() / weight.sum(), {}


def speech_loss(model, data: Data, ids, done: float, variant: int = 0):
    device = model.device
    tokens, labels, positions, mask = (t.to(device) for t in data.batch(ids, variant))
    embeds = model.get_input_embeddings()(tokens)
    visual = tokens == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], _features(model, data.pixels(ids).to(device)).to(embeds.dtype))
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    answer = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][answer]).float()
    target = labels[:, 1:][answer]
    each = F.cross_entropy(logits, target, reduction="none")
    named = torch.isin(target, data.names[:-1].to(device)) | torch.isin(target, data.yes_no.to(device))
    weight = torch.where(named, 2.0, 1.0)
    loss, fade = (each * weight).sum() / weight.sum(), 0.4 * max(0.0, 1 - done / 0.7)
    if fade:
        see = F.cross_entropy(model.lm_head(hidden[visual]).float(), data.patch_words(ids).to(device).flatten())
        loss = loss + fade * see
    return loss, {"words": each.mean().item(), "objects": each[named].mean().item()}


def run_stage(name, loss_fn, model, data, optimizers, args, steps, folder):
    """Train for `steps`, writing a checkpoint every minute; resumes from it."""
    file, start, saved = folder / f"{name}.pt", 0, time.time()
    generator, spent = torch.Generator().manual_seed(args.seed), 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, s in zip(optimizers.all, state["optimizers"]):
            opt.load_state_dict(s)
        start, spent = state["step"], state["spent"]
    order = torch.cat([torch.randperm(data.count, generator=generator) for _ in range(1 + steps * args.batch // data.count)])
    begin, mean, log = time.time(), {}, (folder / "log.jsonl").open("a")
    with progress() as bar:
        job = bar.add_task(name, total=steps, completed=start, note="")
        for step in range(start, steps):
            at = step * args.batch
            ids = order[at : at + args.batch]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                extra = {"variant": at // data.count} if loss_fn is speech_loss else {}
                loss, parts = loss_fn(model, data, ids, step / steps, **extra)
            loss.backward()
            optimizers.step(step / steps)
            for key, value in {"loss": loss.item(), **parts}.items():
                mean[key] = 0.98 * mean.get(key, value) + 0.02 * value
            bar.update(job, advance=1, note=" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            last = step == steps - 1
            if last or time.time() - saved > 60:
                saved = time.time()
                total = spent + saved - begin
                partial = file.with_suffix(".tmp")
                torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers.all], "step": step + 1, "spent": total}, partial)
                partial.replace(file)
                print(json.dumps({"stage": name, "step": step + 1, "seconds": round(total), **{k: round(v, 4) for k, v in mean.items()}}), file=log, flush=True)
    return spent + time.time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=30000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sight-steps", type=int, default=1500)
    parser.add_argument("--speech-steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    parser.add_argument("--work", type=Path, default=Path("outputs/scenes-training"), help="rendered pictures and checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.work = args.work / f"{fingerprint()}-seed{args.seed}-batch{args.batch}"
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if not (args.work / "processor").exists():
        build_processor().save_pretrained(args.work / "processor")
    processor = AutoProcessor.from_pretrained(args.work / "processor")
    data = Data(args.work, args.images, processor, args.processes)
    data.yes_no = torch.tensor([processor.tokenizer(f" {w}")["input_ids"][0] for w in ("Yes", "No")])
    model = build_model(processor).to(args.device).train()
    seconds = run_stage("sight", sight_loss, model, data, Optimizers(model, {"language_model.layers": 0.0}, 0.02, 2e-3), args, args.sight_steps, args.work)
    seconds += run_stage("speech", speech_loss, model, data, Optimizers(model, {"vision_tower": 0.2}, 0.02, 2e-3), args, args.speech_steps, args.work)
    model.eval().to(torch.float16).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"trained in {seconds / 60:.1f} minutes; weights in {args.out}")


if __name__ == "__main__":
    main()
