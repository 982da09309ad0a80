"""Shared by all tests: repeatable, offline, and few threads, since the models are tiny."""

import logging
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings

from decoders import compiled

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other
logging.getLogger("torch.__trace").disabled = True  # a line for each thing that is traced, which pytest would keep


_figures: list[tuple[str, ...]] = []
_cells: dict[str, dict[str, str]] = {}


@pytest.fixture
def figures():
    """Takes rows (source, case, what was compared, largest difference) for the table printed with --figures."""
    return lambda *row: _figures.append(tuple(map(str, row)))


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`run.py` in this process, which has imported everything: words, and a folder of the run, to what it said; or
    another program in its place.
    """
    from hydra.core.plugins import Plugins

    from experiments.cli import main

    def run(*words, folder=None, program=main.command, columns=160):
        own = [f"hydra.run.dir={folder}", f"results={folder}/results.sqlite"] if folder else []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["run.py", *words, *own])
            patch.setattr(main, "failures", [])
            patch.setattr(Plugins, "instantiate_launcher", Plugins.instantiate_launcher)  # command() wraps it
            patch.setenv("COLUMNS", str(columns))
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                program()
        return subprocess.CompletedProcess(words, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def composed():
    """Words to the config that `run.py` makes of them."""
    import hydra

    from experiments.inputs.conf_files import CONF

    def config(*words):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("run", list(words))

    return config


@pytest.fixture
def traced(request, monkeypatch):
    """Compiled steps are run as they were traced; with the parameter `eager`, faster, by the first of torch's two
    tracers alone.
    """
    torch._dynamo.reset()
    step = torch.compile(compiled._step, fullgraph=True, backend=getattr(request, "param", "aot_eager"))
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    yield
    torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption(
        "--figures",
        action="store_true",
        help="print what the comparisons with official traces measured, case by case, and what each family passed",
    )


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--figures") and _figures:
        widths = [max(map(len, column)) for column in zip(*_figures, strict=False)]
        for row in _figures:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)))
        terminalreporter.write_line(f"{len(_figures)} cases match")
    if config.getoption("--figures") and _cells:
        _table(terminalreporter, _cells)


def pytest_runtest_logreport(report):
    """Notes tests that have a `cell`: (family, check, whether a refusal was tested)."""
    cell = dict(report.user_properties).get("cell")
    if cell and (report.when == "call" or not report.passed):
        name, check, refused = cell
        word = {"passed": "refused" if refused else "pass", "skipped": "n/a"}.get(report.outcome, "FAIL")
        _cells.setdefault(check, {}).setdefault(name, word)


def _table(terminal, cells: dict[str, dict[str, str]]) -> None:
    """Families by checks."""
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [("", *cells), *((name, *(row.get(name, "-") for row in cells.values())) for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    for row in rows:
        terminal.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
