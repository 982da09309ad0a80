"""The command line of training programs."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


def precision(device: str) -> str:
    """bf16 where the machine multiplies it faster than fp32."""
    if device == "cpu":
        units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return "bf16" if any(getattr(torch.cpu, name, bool)() for name in units) else "fp32"
    return "bf16" if device != "cuda" or torch.cuda.is_bf16_supported() else "fp32"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer >= 1, not '{text}'")
    return int(text)


def shared(
    description: str, images: int, sight: tuple[int, int], speech: tuple[int, int], seed: int
) -> argparse.ArgumentParser:
    """A parser with the options that all of them have.

    Args:
        images, seed: defaults.
        sight, speech: defaults of each stage's steps, and of the scenes a step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=positive, default=images)
    for stage, (steps, batch) in (("sight", sight), ("speech", speech)):
        parser.add_argument(f"--{stage}-steps", type=positive, default=steps)
        parser.add_argument(f"--{stage}-batch", type=positive, default=batch)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--device", default=device)
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default=precision(device), help="of the multiplications in training"
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
    parser.add_argument("--processes", type=positive, default=2)
    return parser


def run(train: Callable[[argparse.Namespace], float], args: argparse.Namespace) -> float:
    """Train; Ctrl-C ends it with the way to go on."""
    try:
        return train(args)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from the last checkpoint.")
        raise SystemExit(130) from None
