"""Resumable stages of training, and their optimizers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


class Optimizers:
    """Muon for matrices inside the layers, AdamW for the rest; warm-up, then cosine to a twentieth.

    Args:
        model: parameters that need no gradient are left out.
        scales: by a part of a parameter's name, what its learning rate is multiplied by.
        muon, adam: learning rates.
        low_rank: the learning rate of LoRA's matrices, with AdamW; None: there are none.
    """

    def __init__(
        self, model, scales: dict[str, float], muon: float, adam: float, low_rank: float | None = None
    ) -> None:
        rates = {"muon": muon, "adam": adam, "low rank": low_rank}
        groups: dict[str, list[dict]] = {name: [] for name in rates}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            scale = next((s for part, s in scales.items() if part in name), 1.0)
            matrix = p.ndim == 2 and "embed" not in name and "lm_head" not in name
            kind = "low rank" if "lora_" in name else "muon" if matrix else "adam"
            groups[kind].append({"params": [p], "lr": scale * rates[kind]})
        self.all = [
            torch.optim.Muon(groups["muon"], weight_decay=0.02, adjust_lr_fn="original"),
            torch.optim.AdamW(groups["adam"] + groups["low rank"], weight_decay=0.0, betas=(0.9, 0.97)),
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


Loss = Callable[[np.ndarray, float, int], tuple[Tensor, dict[str, Tensor]]]  # ids, share done, wording


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        name: of its checkpoint, `NAME.pt`.
        loss: of the scenes with these indices; and what is logged.
        steps, batch: how long, and scenes a step.
        seed: of the order of scenes.
        bf16: whether to multiply in bfloat16.
        save_every: seconds between checkpoints.
    """

    name: str
    loss: Loss
    steps: int
    batch: int
    seed: int
    bf16: bool
    save_every: float

    def run(self, model, optimizers: Optimizers, count: int, variants: int, folder: Path) -> float:
        """Train on `count` scenes in `variants` wordings, one an epoch, and write checkpoints into `folder`; resumes
        from there. Parameters that need no gradient are not kept.

        Returns:
            The seconds spent, earlier ones included.
        """
        file = folder / f"{self.name}.pt"
        start, spent, mean = self._resume(file, model, optimizers)
        generator = torch.Generator().manual_seed(self.seed)
        epochs = 1 + self.steps * self.batch // count
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)]).numpy()
        begin = saved = time.time()
        with progress() as bar, (folder / "log.jsonl").open("a") as log:
            job = bar.add_task(self.name, total=self.steps, completed=start, note="")
            for step in range(start, self.steps):
                at = step * self.batch
                with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, parts = self.loss(order[at : at + self.batch], step / self.steps, at // count % variants)
                loss.backward()
                optimizers.step(step / self.steps)
                for key, value in {"loss": loss, **parts}.items():
                    mean[key] = 0.98 * mean.get(key, value.item()) + 0.02 * value.item()
                bar.update(job, advance=1, note=" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
                if step == self.steps - 1 or time.time() - saved > self.save_every:
                    saved = time.time()
                    total = spent + saved - begin
                    state = {
                        "model": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
                        "optimizers": [o.state_dict() for o in optimizers.all],
                        "step": step + 1,
                        "spent": total,
                        "mean": mean,
                    }
                    partly = file.with_suffix(".tmp")
                    torch.save(state, partly)
                    partly.replace(file)
                    line = {"stage": self.name, "step": step + 1, "seconds": round(total)}
                    print(json.dumps(line | {k: round(v, 4) for k, v in mean.items()}), file=log, flush=True)
        return spent + time.time() - begin

    @staticmethod
    def _resume(file: Path, model, optimizers: Optimizers) -> tuple[int, float, dict[str, float]]:
        if not file.exists():
            return 0, 0.0, {}
        state = torch.load(file, weights_only=True, map_location=model.device)
        restore(model, state["model"])
        for opt, s in zip(optimizers.all, state["optimizers"], strict=True):
            opt.load_state_dict(s)
        return state["step"], state["spent"], state["mean"]


def restore(model, weights: dict[str, Tensor]) -> None:
    """Put back the parameters that a checkpoint kept."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def compile_layers(layers: Iterable[torch.nn.Module]) -> None:
    for layer in layers:
        layer.compile()
