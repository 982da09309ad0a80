"""Benchmarks: what is shown and asked, and how answers are scored. One file a benchmark, one yaml each in
`conf/task`.
"""

from .amber import AmberGenerative, AmberQuestions
from .base import Captions, Item, Task
from .coco import CocoCaptions, CocoPope
from .files import Files
from .open import MMHal, MMVet
from .pope import PopeFile
from .scenes import Scenes, ScenesPope

__all__ = [
    "AmberGenerative",
    "AmberQuestions",
    "Captions",
    "CocoCaptions",
    "CocoPope",
    "Files",
    "Item",
    "MMHal",
    "MMVet",
    "PopeFile",
    "Scenes",
    "ScenesPope",
    "Task",
]
