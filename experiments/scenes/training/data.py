"""Training scenes as tensors: images, what owns their patches, and their texts, in the format of a model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...metrics import chair
from ..architecture import MEAN, STD
from ..kinds import COUNTABLE
from ..language import NUMBERS, PROMPTS, caption, plural, questions
from ..world import CATEGORIES, COLOURS, COLUMNS, ROWS, SIZE, Scene, draw, fingerprint, patch_owners, render
from .stages import progress

EXTENTS = ("small", "large")


def rendered(work: Path) -> Path:
    """The folder for what is made of these scenes, texts and readings."""
    return work / fingerprint(Path(chair.__file__))


def recipe(file: str) -> str:
    """Eight hex digits of a training program: checkpoints of another one are not gone on with."""
    sources = [Path(file), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:8]


def scene(index: int) -> Scene:
    """The training scene of that index: every fifth is crowded."""
    return draw("train", "crowded" if index % 5 == 4 else "typical", index)


@dataclass(frozen=True)
class Format:
    """How a model is shown scenes and texts.

    Attributes:
        tokenizer: the model's, with the token `<image>`.
        before, after: the prompt's text before the visual tokens, and after them up to the question.
        asked: the question, with `{prompt}`, up to the answer.
        said: the answer, with `{answer}`; the end-of-sequence token follows.
        side: visual tokens in a row and in a column.
        pixels: width and height of what the vision tower takes; scenes are enlarged to it.
        text: tokens of text beside each image.
    """

    tokenizer: PreTrainedTokenizerBase
    before: str
    after: str
    asked: str
    said: str
    side: int
    pixels: int
    text: int

    @property
    def visual(self) -> int:
        """Visual tokens of an image."""
        return self.side**2

    def pack(self, texts: list[tuple[str, str]], s: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, number of the text, position, and whether it is to be learnt, [4, text]; and the index of the thing
        that a token names, -1 for none.
        """
        out, things, at = np.zeros((4, self.text), np.int32), np.full(self.text, -1), 0
        for number, (prompt, answer) in enumerate(texts, 1):
            asked, said = self.asked.format(prompt=prompt), self.said.format(answer=answer)
            encoded = self.tokenizer(asked + said, return_offsets_mapping=True)
            ids = encoded["input_ids"] + [self.tokenizer.eos_token_id]
            offsets = [*encoded["offset_mapping"], (0, 0)]
            length = min(len(ids), self.text - at)
            if number > 1 and length < len(ids):  # only the first may be cut
                break
            out[0, at : at + length] = ids[:length]
            out[1, at : at + length] = number
            out[2, at : at + length] = np.arange(length)
            out[3, at + len(self.tokenizer(asked)["input_ids"]) : at + length] = 1
            for m in chair.mentions(asked + said):
                alone = [i for i, t in enumerate(s.things) if t.name == m.category]
                last = next(j for j, (a, b) in enumerate(offsets) if b >= m.end)
                if len(alone) == 1 and last < length:
                    things[at + last] = alone[0]
            at += length
        return out, things


def attributes(s: Scene) -> np.ndarray:
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


def _shapes(count: int, variants: int, form: Format) -> dict[str, tuple[type, tuple[int, ...]]]:
    return {
        "images": (np.uint8, (count, SIZE, SIZE, 3)),
        "owners": (np.int8, (count, form.visual, 5)),
        "texts": (np.int32, (4, count, variants, form.text)),
        "named": (np.int8, (count, variants, form.text, 5)),
    }


def _prepare(indices: range, form: Format, variants: int) -> list[np.ndarray]:
    """Images, the attributes of what owns their patches, their texts, packed, and the attributes of what the texts'
    tokens name.
    """
    images, owners, packed, named = (
        np.zeros(shape, kind) for kind, shape in _shapes(len(indices), variants, form).values()
    )
    for j, i in enumerate(indices):
        s = scene(i)
        described = attributes(s)
        images[j], owners[j] = np.asarray(render(s)), described[patch_owners(s, form.side).ravel()]
        for v in range(variants):
            packed[:, j, v], things = form.pack(_texts(s, v), s)
            named[j, v] = described[things]
    return [images, owners, packed, named]


@dataclass
class Batch:
    """One step's images and texts.

    Attributes:
        pixels: [b, 3, pixels, pixels].
        owners: attributes of what owns each patch, [b, visual, 5].
        tokens: the whole row, [b, T]: prompt, visual tokens, texts.
        learn: whether each token is to be learnt, [b, T].
        positions: [b, T].
        mask: who sees whom, [b, 1, T, T]: a text sees the image and itself.
        named: attributes of what each token names, [b, T, 5].
    """

    pixels: Tensor
    owners: Tensor
    tokens: Tensor
    learn: Tensor
    positions: Tensor
    mask: Tensor
    named: Tensor


class Data:
    """Training scenes, rendered once into `folder` and read from there."""

    def __init__(self, folder: Path, count: int, variants: int, form: Format, processes: int):
        self.count, self.variants, self.form = count, variants, form
        shapes = _shapes(count, variants, form)
        files = {name: folder / f"{name}-{count}x{variants}-{form.side}.npy" for name in shapes}
        if not all(f.exists() for f in files.values()):
            _render(files, shapes, count, variants, form, processes)
        self.images, self.owners, self.texts, self.named = (np.load(f, mmap_mode="r") for f in files.values())
        tokenizer = form.tokenizer
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.prefix = torch.tensor(
            tokenizer(form.before)["input_ids"] + [image] * form.visual + tokenizer(form.after)["input_ids"]
        )
        self.words = Words(tokenizer)

    def see(self, ids: np.ndarray, device) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, pixels, pixels] and what owns the patches [b, visual, 5]."""
        x = torch.from_numpy(self.images[ids]).to(device).permute(0, 3, 1, 2).float()
        if self.form.pixels != SIZE:
            x = F.interpolate(x, (self.form.pixels,) * 2, mode="bicubic").clamp(0, 255).round()
        return (x / 255 - MEAN) / STD, torch.from_numpy(self.owners[ids]).to(device).long()

    def batch(self, ids: np.ndarray, variant: int, device) -> Batch:
        """The images and texts of these scenes in one wording."""
        tokens, number, position, learn = torch.from_numpy(self.texts[:, ids, variant]).to(device).long()
        n, text = len(self.prefix), self.form.text
        front = self.prefix.to(device).expand(len(ids), n)
        number = F.pad(number, (n, 0))
        mask = (number[:, :, None] == number[:, None, :]) | (number[:, None, :] == 0)
        mask[:, :, n:] &= (number[:, None, n:] > 0) | torch.eye(n + text, dtype=torch.bool, device=device)[
            :, n:
        ]  # filling sees itself alone
        mask &= torch.ones_like(mask[0]).tril()
        positions = torch.cat([torch.arange(n, device=device).expand(len(ids), n), n + position], 1)
        named = F.pad(torch.from_numpy(self.named[ids, variant]).to(device).long(), (0, 0, n, 0), value=-1)
        return Batch(
            *self.see(ids, device),
            torch.cat([front, tokens], 1),
            F.pad(learn, (n, 0)).bool(),
            positions,
            mask[:, None],
            named,
        )


def _render(files: dict[str, Path], shapes, count: int, variants: int, form: Format, processes: int) -> None:
    partly = [f.with_suffix(f".{os.getpid()}") for f in files.values()]
    arrays = [
        np.lib.format.open_memmap(f, "w+", kind, shape)
        for f, (kind, shape) in zip(partly, shapes.values(), strict=True)
    ]
    chunks = [range(i, min(i + 100, count)) for i in range(0, count, 100)]
    with Pool(processes) as pool, progress() as bar:
        job = bar.add_task("rendering", total=count, note="")
        found = pool.imap(partial(_prepare, form=form, variants=variants), chunks)
        for chunk, (images, owners, packed, named) in zip(chunks, found, strict=True):
            span = slice(chunk.start, chunk.stop)
            arrays[0][span], arrays[1][span], arrays[2][:, span], arrays[3][span] = images, owners, packed, named
            bar.advance(job, len(chunk))
    del arrays
    for part, file in zip(partly, files.values(), strict=True):
        part.replace(file)


class Words:
    """The words that stand for what owns a patch, in the language model's own vocabulary.

    `groups`: for name, row, column, colour and size, the tokens [g] among which one chooses, and the target [classes,
    g]; names of several tokens ask for each of them. The last name is the background's, a full stop. `heavy`: tokens
    that say something of the image.
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
