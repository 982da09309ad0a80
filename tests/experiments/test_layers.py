"""The order of the packages of experiments/: each imports from those before it, and none from those after it."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "experiments"
ORDER = (
    {"cli.arguments", "inputs", "metrics"},  # arguments: checks words against the files of `conf`
    {"models", "probes", "scenes.kinds", "scenes.language", "scenes.world"},
    {"tasks"},
    {"results"},
    {"runner"},
    {"studies"},
    {"findings", "integrations", "judge", "report"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def _level(name: str) -> int | None:
    """Of a module by its name below `experiments`; None for commands, which import what they need."""
    return next((LEVEL[k] for k in LEVEL if name == k or name.startswith(f"{k}.")), None)


def _imported(file: Path) -> set[str]:
    """What a file imports of `experiments`, by the names below it."""
    here, found = ["experiments", *file.relative_to(HERE).with_suffix("").parts], set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(here[: -node.level] if node.level else []), *filter(None, [node.module])])
            found |= {f"{base}.{name.name}" for name in node.names}
    return {name.removeprefix("experiments.") for name in found if name.startswith("experiments.")}


@pytest.mark.parametrize("package", sorted({name.split(".")[0] for name in LEVEL}))
def test_a_package_imports_none_that_stands_above_it(package):
    files = sorted((HERE / package).rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        own = _level(".".join(file.relative_to(HERE).with_suffix("").parts))
        for name in sorted(_imported(file)) if own is not None else ():
            other = _level(name)
            if other is not None and other > own:
                wrong.append(f"{file.relative_to(HERE)} imports {name}")
    assert wrong == []
