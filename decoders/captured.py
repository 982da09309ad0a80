"""A decode step as a CUDA graph, also where torch.compile cannot make one: the kernels of the eager step, recorded once
and launched together.

A recording reads and writes at fixed addresses. What changes from step to step is therefore copied into static buffers
before it is replayed: the model's inputs, the masks of the tap, and the slots that are written. The pool is written
where it lies; when its buffers are replaced, at bucket borders and where slots are dropped, recordings are made anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import hf
from .attention import Tap
from .errors import StackError
from .kv_pool import SlotTable

WARM_UPS = 3  # runs before a recording, in which libraries set themselves up
MOST = 16  # recordings for one pool; a step that makes more never repeats itself
INSIDE = ("visual", "real", "visual_tokens", "places")  # tensors of `Inside` that belong to a forward
_log = logging.getLogger("decoders")


@dataclass
class Shown:
    """What a step leaves: logits [s, q, v], or as `EarlyLogits.join` has it, and the others as in `Tap`. Of a
    recording, these tensors are written over when it is replayed.
    """

    logits: Tensor
    queries: dict[int, Tensor]
    hidden: dict[Any, Tensor]
    rows: dict[int, dict[str, Tensor]]


@dataclass
class Recorder:
    """What is asked of CUDA, on one device."""

    device: torch.device

    def aside(self, run: Callable[[], Shown]) -> None:
        """Run on a stream of its own, as it must be done before a recording."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, run: Callable[[], Shown]) -> tuple[Any, Shown]:
        """A recording, and the tensors that it will write; nothing is run yet."""
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                shown = run()
        return graph, shown

    def replay(self, recording: Any) -> None:
        """Run what was recorded, on the current stream."""
        with torch.cuda.device(self.device):
            recording.replay()


def not_capturable(runner, shown: bool, changing: list[str]) -> str | None:
    """Why the step cannot be recorded, or None.

    Args:
        runner: after the prompt was run.
        shown: whether `generate` returns attentions or hidden states.
        changing: names of decoders that may do other things inside the forward from step to step.
    """
    name = type(runner.model).__name__
    if runner.model.device.type != "cuda":
        return f"CUDA graphs need a GPU, and the model is on {runner.model.device.type}"
    if not runner.pooled:
        return "its cache is not the loop's own"
    if runner.recurrent:
        return f"{name} has layers that keep running states, which move from step to step"
    if not runner.takes_positions:
        return f"{name} takes its positions from the length of its cache, which changes at every step"
    if shown or runner.a_row_a_sequence:
        return "output_attentions and output_hidden_states ask for what a recorded step does not show"
    if hf.has_device_hooks(runner.model):
        return f"{name} is spread over devices (device_map), with hooks between its parts"
    if changing:
        return (
            f"{' and '.join(changing)} may do other things inside the forward from step to step, which a recording"
            " would not notice; Requirements(constant_forward=True) says that it is not so"
        )
    return None


@dataclass
class _Recording:
    """One recorded step: what goes in, by place in `_Step.changing`, and what comes out."""

    recording: Any
    inputs: list[Tensor]
    shown: Shown


@dataclass
class _Step:
    """A step that is to be run.

    Attributes:
        changing: its tensors, each once.
    """

    model: Any
    tap: Tap
    inputs: dict[str, Any]
    tables: list[SlotTable]
    changing: list[Tensor] = field(init=False)

    def __post_init__(self):
        every = (*self.inputs.values(), *self.tap.masks.values(), *self.inside(), *self.slots())
        self.changing = list({id(x): x for x in every if isinstance(x, Tensor)}.values())

    def inside(self) -> list[Any]:
        """What the hooks inside the forward are told of its tokens and slots."""
        return [] if self.tap.inside is None else [getattr(self.tap.inside, name) for name in INSIDE]

    def slots(self) -> list[Tensor | None]:
        """Where each layer writes."""
        return [layer.slots for layer in self.layers()]

    def place(self, masks: dict[int, Tensor], inside: list[Any], slots: list[Tensor | None]) -> None:
        """Have the forward take these."""
        self.tap.masks = dict(masks)
        for name, value in zip(INSIDE, inside, strict=False):
            setattr(self.tap.inside, name, value)
        for layer, index in zip(self.layers(), slots, strict=True):
            layer.slots = index

    def layers(self) -> Iterator[Any]:
        for table in self.tables:
            yield from table.layers

    def buffers(self) -> tuple[int, ...]:
        """Where keys and values lie."""
        return tuple(x.data_ptr() for layer in self.layers() for x in (layer.keys, layer.values))

    def signature(self, read: tuple[int, ...]) -> tuple:
        """What a recording must have in common with it: its shapes, what stands where, and what is no tensor."""
        place = {id(x): i for i, x in enumerate(self.changing)}

        def of(x: Any) -> Any:
            if isinstance(x, Tensor):
                return place[id(x)]
            return x if x is None or isinstance(x, (bool, int, float, str)) else id(x)

        return (
            read,
            tuple((tuple(x.shape), x.dtype) for x in self.changing),
            tuple((name, of(x)) for name, x in self.inputs.items()),
            tuple((layer, of(x)) for layer, x in self.tap.masks.items()),
            tuple(of(x) for x in (*self.inside(), *self.slots())),
            self.tap.early,
            self.around(),
        )

    def around(self) -> tuple:
        """What else the hooks inside the forward go by."""
        inside = self.tap.inside
        if inside is None:
            return ()
        images = tuple((key, name, id(x)) for key, known in inside.images.items() for name, x in known.items())
        return (inside.branches, inside.in_prompt, images)

    @contextmanager
    def over(self, static: list[Tensor]) -> Iterator[Callable[[], Shown]]:
        """Within, the step yielded runs over these tensors in place of its own."""
        found = {id(x): y for x, y in zip(self.changing, static, strict=True)}

        def swap(x: Any) -> Any:
            return found.get(id(x), x)

        inputs = {name: swap(x) for name, x in self.inputs.items()}
        own = (self.tap.masks, self.inside(), self.slots())
        masks = {layer: swap(x) for layer, x in own[0].items()}
        inside, slots = ([swap(x) for x in each] for each in own[1:])

        def run() -> Shown:
            tap = self.tap
            self.place(masks, inside, slots)
            tap.clear()
            logits = self.model(**inputs, return_dict=True).logits
            tap.collect()
            return Shown(logits, tap.queries, tap.hidden, tap.rows)

        try:
            yield run
        finally:
            self.place(*own)
            self.tap.queries, self.tap.hidden, self.tap.rows = {}, {}, {}


@dataclass
class CapturedStep:
    """Runs forwards from recordings, in place of `compiled.CompiledStep`; falls back for good where one cannot be
    recorded and the mode is `auto`.

    Attributes:
        mode: `auto` or `captured`.
        seconds: spent on recording; graphs: how many recordings were made.
    """

    mode: str
    recorder: Recorder
    seconds: float = 0.0
    graphs: int = 0
    failed: bool = False
    _recordings: dict[tuple, _Recording] = field(default_factory=dict)
    _buffers: tuple[int, ...] = ()

    def __call__(
        self, model, tap: Tap, inputs: dict[str, Any], read: tuple[int, ...], tables: list[SlotTable]
    ) -> Tensor | None:
        """Logits as in `Shown`, or None where the step is to be run eagerly."""
        if self.failed:
            return None
        step = _Step(model, tap, inputs, tables)
        if (buffers := step.buffers()) != self._buffers:  # what was recorded would write into memory that is freed
            self._recordings, self._buffers = {}, buffers
        signature = step.signature(read)
        if signature not in self._recordings:
            began = time.perf_counter()
            try:
                self._recordings[signature] = self._record(step)
            except RuntimeError as error:
                self._give_up(model, error)
                return None
            self.graphs, self.seconds = self.graphs + 1, self.seconds + time.perf_counter() - began
        else:
            _copy(step.changing, self._recordings[signature].inputs)
        one = self._recordings[signature]
        self.recorder.replay(one.recording)
        # queries are stacked into one tensor by who reads them; what follows may live longer than this step
        tap.queries = dict(one.shown.queries)
        tap.hidden = {i: x.clone() for i, x in one.shown.hidden.items()}
        tap.rows = {i: {heads: x.clone() for heads, x in found.items()} for i, found in one.shown.rows.items()}
        return one.shown.logits.clone()

    def _record(self, step: _Step) -> _Recording:
        if len(self._recordings) >= MOST:
            raise RuntimeError(f"{MOST} recordings were made for one pool, and the next step is like none of them")
        static = [x.clone(memory_format=torch.contiguous_format) for x in step.changing]
        with step.over(static) as run:
            self.recorder.aside(run)
            recording, shown = self.recorder.record(run)
        return _Recording(recording, static, shown)

    def _give_up(self, model, error: RuntimeError) -> None:
        self._recordings, self.failed = {}, True
        why = f"the step of {type(model).__name__} cannot be captured: {(str(error).splitlines() or [''])[0]}"
        if self.mode == "captured":
            raise StackError(f"{why} (compile=off runs it)") from error
        _log.warning("%s; it runs as it is", why)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy all, those of one dtype together: masks are as many as layers."""
    for dtype in {x.dtype for x in sources}:
        pairs = [(x, y) for x, y in zip(sources, targets, strict=True) if x.dtype == dtype]
        torch._foreach_copy_([y for _, y in pairs], [x for x, _ in pairs])
