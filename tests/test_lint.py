"""The tools of `make lint`: one version of each everywhere, and generated pages that keep to the rule."""

import re
import tomllib
from pathlib import Path

import yaml

from experiments.findings.page import wrapped

ROOT = Path(__file__).resolve().parent.parent


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.partition(";")[0].split("==") for line in lines if line and not line.startswith("#")]
    return {package.strip().lower().replace("_", "-"): version.strip() for package, version in pairs}


def test_hooks_and_locks_name_the_same_versions():
    lint = _pins("requirements-lint.lock")
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    named = dict(dependency.split("==") for hook in hooks for dependency in hook["additional_dependencies"])
    assert named and named == {package: lint[package] for package in named}
    for other in (_pins("requirements.lock"), _pins("requirements-test.lock")):
        both = lint.keys() & other.keys()
        assert {package: lint[package] for package in both} == {package: other[package] for package in both}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lint"]
    assert [name for name in (re.split(r"[<>=]", line)[0] for line in extra) if name not in lint] == []


def test_a_wrapped_paragraph_stays_one_paragraph():
    text = (
        " ".join(["word"] * 22) + " then - and * and 3. and > and # stand in the text, " + "x" * 130 + " " + "y " * 60
    )
    for cut in range(60):  # every place of a break
        lines = wrapped(text[cut:].strip(), "  ").split("\n")
        assert len(lines) > 3 and " ".join(line.strip() for line in lines) == text[cut:].strip()
        assert all(line.startswith("  ") and not re.match(r"([-*>#]|3\.) ", line.strip()) for line in lines[1:])
        assert all(len(line) <= 120 or " " not in line.strip() for line in lines)
