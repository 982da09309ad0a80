"""A decode step as one graph: `torch.compile` of the model's forward, with what is read inside it.

Shapes are those of the eager step: they change with the rows and, at bucket borders, with the capacity of the pool,
which is a symbol in the graph, so that a new capacity needs no new graph.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import hf
from .attention import Tap, set_traced
from .captured import CapturedStep, Recorder, not_capturable
from .errors import StackError, choices
from .kv_pool import SlotTable

MODES = ("off", "auto", "on", "captured")
PAYS = 128  # new tokens from which on `auto` compiles
_LIMIT = 64  # graphs of a step: one for each number of rows, of candidates and of layers that are pruned apart
_log = logging.getLogger("decoders")


def check_mode(mode: str) -> str:
    """`mode` if it is one.

    Raises:
        StackError: naming the nearest.
    """
    if mode not in MODES:
        raise StackError(choices(mode, MODES, "compile"))
    return mode


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device, or None."""
    if device.type != "cpu":
        return None
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(shutil.which(one) for one in wanted):
        return None
    return (
        f"torch.compile needs a C++ compiler on a CPU, and {' and '.join(wanted)} cannot be found; install one: apt"
        " install g++, dnf install gcc-c++, or conda install gxx"
    )


def not_compilable(model, recurrent: bool, takes_positions: bool, shown: bool) -> str | None:
    """Why the step of this model cannot be compiled, or None.

    Args:
        recurrent: whether layers keep running states.
        takes_positions: whether the model is told its positions.
        shown: whether `generate` returns attentions or hidden states.
    """
    if (why := no_compiler(model.device)) is not None:
        return why
    if recurrent:
        return f"{type(model).__name__} has layers that keep running states, whose step is not one of fixed shape"
    if not takes_positions:
        return f"{type(model).__name__} takes its positions from the length of its cache, which changes at every step"
    if not hf.takes_ready_masks(model):
        return f"{type(model).__name__} makes its masks itself"
    if shown:
        return "output_attentions and output_hidden_states ask for what a compiled step does not show"
    if (why := hf.splits_forward(model)) is not None:
        return why
    return None


def _step(model, tap: Tap, inputs: dict[str, Any], read: tuple[int, ...]) -> Tensor:
    """What is compiled: a forward, [s, q, v], or as `EarlyLogits.join` has it.

    Args:
        read: hidden states that are kept. The hooks that keep them are no part of a graph's guards; to ask for these
            makes them one.
    """
    set_traced(tap)
    tap.clear()
    logits = model(**inputs, return_dict=True).logits
    set_traced(None)
    tap.collect()
    assert all(i in tap.hidden for i in read)
    return logits


@functools.cache
def _compiled() -> Callable:
    """`_step`, compiled; made when it is needed, since torch's compiler takes seconds to import."""
    return torch.compile(_step, fullgraph=True)


def choose(mode: str, runner, new_tokens: int, shown: bool, changing: list[str]) -> CompiledStep | CapturedStep | None:
    """What runs the decode steps of a generation, or None for the eager forward.

    Args:
        mode: one of `MODES`. `auto` compiles on a GPU, where at least `PAYS` tokens are to come, and captures what does
            not compile.
        runner: after the prompt was run.
        shown: whether `generate` returns attentions or hidden states.
        changing: as in `not_capturable`.

    Raises:
        StackError: with `on`, where the step cannot be compiled; with `captured`, where it cannot be captured.
    """
    model = runner.model
    if mode == "off" or (mode == "auto" and (model.device.type == "cpu" or new_tokens < PAYS)):
        return None
    if mode == "captured":
        if (why := not_capturable(runner, shown, changing)) is not None:
            raise StackError(f"compile=captured: {why}. compile=off runs it")
        return CapturedStep(mode, Recorder(model.device))
    if not runner.pooled:
        why = "its cache is not the loop's own"
    else:
        why = not_compilable(model, bool(runner.recurrent), runner.takes_positions, shown)
    if mode == "on":
        if why is not None:
            raise StackError(f"compile=on: {why}. compile=off runs it")
        return CompiledStep(mode)
    refused = not_capturable(runner, shown, changing)
    captured = CapturedStep(mode, Recorder(model.device)) if refused is None else None
    if why is None:
        return CompiledStep(mode, instead=captured)
    _log.warning("not compiled: %s; %s", why, _otherwise(captured))
    return captured


def _otherwise(captured: CapturedStep | None) -> str:
    return "it runs as it is" if captured is None else "it is captured as a CUDA graph"


@dataclass
class CompiledStep:
    """Runs forwards compiled; falls back for good where one does not compile and the mode is `auto`.

    Attributes:
        mode: `auto` or `on`.
        instead: what runs steps once one did not compile; None for the eager forward.
        seconds: spent on compiling; graphs: how many were made.
    """

    mode: str
    instead: CapturedStep | None = None
    seconds: float = 0.0
    graphs: int = 0
    failed: bool = False
    _begun: bool = False
    _capacities: dict[int, int] = field(default_factory=dict)

    def __call__(
        self, model, tap: Tap, inputs: dict[str, Any], read: tuple[int, ...], tables: list[SlotTable]
    ) -> Tensor | None:
        """Logits as `_step` makes them, or None where the step is to be run eagerly."""
        if self.failed:
            return None if self.instead is None else self.instead(model, tap, inputs, read, tables)
        for i, table in enumerate(tables):
            if self._capacities.get(i) != table.capacity:
                self._capacities[i] = table.capacity
                for layer in table.layers:
                    torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
                    torch._dynamo.maybe_mark_dynamic(layer.values, 2)
        for mask in {id(mask): mask for mask in tap.masks.values()}.values():
            torch._dynamo.maybe_mark_dynamic(mask, 3)
        for slots in () if tap.inside is None else (tap.inside.visual, tap.inside.places):
            if slots is not None:
                torch._dynamo.maybe_mark_dynamic(slots, 2)
        before, began = _graphs(), time.perf_counter()
        if not self._begun and not before:
            _log.info("compiling the decode step; the first time on a machine this takes a minute or so")
        self._begun = True
        try:
            with torch._dynamo.config.patch(recompile_limit=_LIMIT, accumulated_recompile_limit=16 * _LIMIT):
                logits = _compiled()(model, tap, inputs, read)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            set_traced(None)
            tap.queries, tap.hidden, tap.rows = {}, {}, {}
            why = f"the step of {type(model).__name__} does not compile: {str(error).splitlines()[0]}"
            if self.mode == "on":
                raise StackError(f"{why} (compile=off runs it)") from error
            _log.warning("%s; %s", why, _otherwise(self.instead))
            self.failed = True
            return self(model, tap, inputs, read, tables)
        if _graphs() > before:
            took = time.perf_counter() - began
            self.graphs, self.seconds = self.graphs + _graphs() - before, self.seconds + took
            _log.info("compiled a step of %s tokens in %.1f s", "x".join(map(str, inputs["input_ids"].shape)), took)
        return logits


def told(step: CompiledStep | CapturedStep | None) -> dict[str, float] | None:
    """What a generation's steps came to: graphs that were made, and seconds; None where they ran eagerly."""
    if isinstance(step, CompiledStep) and step.failed:
        step = step.instead
    return None if step is None or step.failed else {"graphs": step.graphs, "seconds": step.seconds}


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
