"""Many processes that answer batches: actors of Ray, on this machine or on the nodes of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from decoders import StackError

from .. import models
from ..inputs.errors import InputError
from ..tasks import Item
from .generate import Answered, Plan, Speaker, answer, refuse


class Worker:
    """What an actor does: the model is loaded once, and again when a study goes on to another."""

    def __init__(self):
        self.entry, self.loaded = None, None

    def model(self, entry: dict):
        if self.entry != entry:
            self.loaded = self.entry = None  # where the next cannot be loaded, this one is loaded again
            self.loaded, self.entry = models.load(OmegaConf.create(entry)), entry
        return self.loaded

    def answer(self, entry: dict, speaker: Speaker, plan: Plan, wanted: Sequence[Item], most: int) -> Answered:
        model, processor = self.model(entry)
        return answer(replace(speaker, model=model, processor=processor), plan, wanted, most)

    def refuse(self, entry: dict, plans: Sequence[Plan]) -> None:
        refuse(plans, self.model(entry)[0])


@contextmanager
def started(cfg: DictConfig) -> Iterator[list | None]:
    """The actors of a config's `workers`, stopped in the end, and Ray with them if it was started here; None: this
    process does it all.

    Raises InputError for a number of workers that Ray has no room for, or where Ray is missing.
    """
    if cfg.workers == 1 and not isinstance(cfg.workers, bool):
        yield None
        return
    if cfg.workers != "auto" and (isinstance(cfg.workers, bool) or not isinstance(cfg.workers, int) or cfg.workers < 1):
        raise InputError(f"workers is an integer >= 1, or auto, not {cfg.workers!r}")
    try:
        import ray
    except ImportError as error:
        raise InputError("workers other than 1 need the package ray: pip install ray") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=cfg.ray.address,
                **(
                    {"log_to_driver": False, "include_dashboard": False, "logging_level": "warning"}
                    | OmegaConf.to_container(cfg.ray.init, resolve=True)
                ),
            )
        except Exception as error:  # Ray raises many kinds, a bare Exception where it did not start in time
            raise InputError(
                f"Ray does not start with ray.address={cfg.ray.address} and ray.init={cfg.ray.init}: {error}"
            ) from error
    actors: list = []
    try:
        number, options = _wanted(cfg, ray.cluster_resources())
        actors += [ray.remote(Worker).options(**options).remote() for _ in range(number)]
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _wanted(cfg: DictConfig, there: dict[str, float]) -> tuple[int, dict]:
    """How many actors, and the options of each. Raises InputError where they would wait for ever."""
    options = OmegaConf.to_container(cfg.ray.actor, resolve=True)
    if options["num_gpus"] is None:
        options["num_gpus"] = int(
            cfg.workers == "auto" or (there.get("GPU", 0) > 0 and not str(cfg.model.device).startswith("cpu"))
        )
    number = int(there.get("GPU", 0)) if cfg.workers == "auto" else cfg.workers
    if not number:
        raise InputError("workers=auto is one for each GPU, and Ray sees none; give their number: workers=2")
    for name, each in {
        "CPU": options["num_cpus"],
        "GPU": options["num_gpus"],
        **(options.get("resources") or {}),
    }.items():
        if number * (each or 0) > there.get(name, 0):
            less = {"CPU": "ray.actor.num_cpus", "GPU": "ray.actor.num_gpus"}.get(name, f"ray.actor.resources.{name}")
            raise InputError(
                f"{number} workers with {each:g} {name} each do not fit: Ray has {there.get(name, 0):g}; choose fewer"
                f" workers, or less for each with {less}"
            )
    return number, options


@dataclass
class Crew(Speaker):
    """A speaker whose model is in actors.

    entry: of the model, which each of them loads.
    actors: those that live; one that dies for good is taken out, and its batch done by another.
    """

    entry: dict = field(default_factory=dict)
    actors: list = field(default_factory=list)

    @classmethod
    def of(cls, speaker: Speaker, model: DictConfig, actors: list) -> Crew:
        return cls(
            *(getattr(speaker, f.name) for f in fields(Speaker)), OmegaConf.to_container(model, resolve=True), actors
        )

    @property
    def hands(self) -> int:
        return len(self.actors)

    def each(self, plan: Plan, batches: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Answered]]:
        import ray

        asked = Speaker(None, None, self.prompt, self.options, None, self.batch_size, self.seed, self.template)
        todo, free, busy, most = (
            deque(range(len(batches))),
            list(self.actors),
            {},
            dict.fromkeys(self.actors, self.batch_size),
        )
        while todo or busy:
            while todo and free:
                actor, number = free.pop(0), todo.popleft()
                busy[
                    actor.answer.remote(
                        self.entry, asked, plan, [carried(item) for item in batches[number]], most[actor]
                    )
                ] = actor, number
            [ready], _ = ray.wait(list(busy), num_returns=1)
            actor, number = busy.pop(ready)
            try:
                found = _had(ready)
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.OutOfMemoryError,
            ) as error:  # dead for good: Ray has tried again as often as it may
                todo.appendleft(number)
                self.actors.remove(actor)
                if not self.actors:
                    raise InputError(
                        f"every worker has died, the last with: {str(error).splitlines()[0]}\nWhat is done is kept; the"
                        " same command goes on."
                    ) from error
                self.console.print(f"a worker has died for good; {len(self.actors)} go on", style="yellow")
                continue
            most[actor] = min([most[actor], *found.sizes])
            free.append(actor)
            yield number, found

    def refuse(self, plans: Sequence[Plan]) -> None:
        _had([actor.refuse.remote(self.entry, plans) for actor in self.actors])  # all load the model at once


def asked(cfg: DictConfig, here: Speaker, actors: list | None) -> Speaker:
    """Who answers: the actors, where there are any, else this process."""
    return Crew.of(here, cfg.model, actors) if actors else here


def carried(item: Item) -> Item:
    """The item with its picture's bytes: a worker need not see this machine's disk."""
    if not isinstance(item.source, Path):
        return item
    try:
        return replace(item, source=item.source.read_bytes())
    except OSError:
        return item  # as unreadable there as here


def _had(ready) -> Any:
    """A result of Ray's; an error that a user can act on as it was raised there."""
    import ray

    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (InputError, StackError)):
            raise error.cause from None
        raise
