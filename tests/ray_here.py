"""A stand-in for the package Ray, whose actors live in this process: what is sent to them is pickled, and runs at once.

It has what `experiments/runner/workers.py` asks of Ray, and no more.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any


class RayActorError(Exception):
    """An actor is dead."""


class OutOfMemoryError(Exception):
    """A node has no memory left."""


class RayTaskError(Exception):
    """A method raised `cause`."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class Task:
    """What an actor was asked: its value, or the error that it ended in."""

    def __init__(self, value: Any = None, error: Exception | None = None):
        self.value, self.error = value, error


class Actor:
    """An object that is asked by `actor.method.remote(...)`. `answers_left`: how often, before it dies."""

    def __init__(self, kind: type):
        self.object, self.answers_left = kind(), float("inf")

    def __getattr__(self, method: str) -> SimpleNamespace:
        def remote(*args: Any) -> Task:
            if self.answers_left <= 0:
                return Task(error=RayActorError("the actor died"))
            self.answers_left -= 1
            try:
                value = getattr(self.object, method)(*pickle.loads(pickle.dumps(args)))
            except Exception as error:
                return Task(error=RayTaskError(error))
            return Task(pickle.loads(pickle.dumps(value)))

        return SimpleNamespace(remote=remote)


class Ray:
    """The module, of a cluster of so many processors. `alive`: the actors that were not ended."""

    exceptions = SimpleNamespace(
        RayActorError=RayActorError, OutOfMemoryError=OutOfMemoryError, RayTaskError=RayTaskError
    )

    def __init__(self, cpus: int):
        self.cpus, self.running, self.alive = cpus, False, []

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, kind: type) -> SimpleNamespace:
        def made() -> Actor:
            self.alive.append(Actor(kind))
            return self.alive[-1]

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=made))

    def kill(self, actor: Actor) -> None:
        self.alive.remove(actor)

    def wait(self, tasks: list[Task], num_returns: int) -> tuple[list[Task], list[Task]]:
        """The first that were asked are ready."""
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, tasks: Any) -> Any:
        if isinstance(tasks, list):
            return [self.get(task) for task in tasks]
        if tasks.error is not None:
            raise tasks.error
        return tasks.value
