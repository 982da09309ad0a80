"""Benchmarks: what is shown and asked, and how answers are scored. One file a benchmark, one yaml each in `conf/task`."""

from .base import Captions, Item, Task
from .files import Files
from .scenes import Scenes, ScenesPope

__all__ = ["Captions", "Files", "Item", "Scenes", "ScenesPope", "Task"]
