"""What is dear to import is imported only when needed."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEAR = {"torch", "transformers", "matplotlib", "scipy", "statsmodels", "pandas"}
MODULES = "import sys, atexit; atexit.register(lambda: print('MODULES', *sys.modules)); "


def imported(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", MODULES + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MODULES")]
    return {name.split(".")[0] for name in line.split()[1:]}


def test_importing_the_loop_alone_is_cheap():
    found = imported("import decoders")
    assert "decoders" in found
    assert not found & {*DEAR, "hydra", "rich", "sqlite3"}


@pytest.mark.parametrize("word", ["decoder=[prunhal]", "model=lava", "modle=scenes", "decoder.prunehal.rr=1"])
def test_a_misspelt_word_is_refused_before_dear_imports(word):
    found = imported(f"sys.argv = ['run.py', '{word}']; from experiments.cli.main import command; command()")
    assert "experiments" in found and not found & DEAR


def test_help_is_cheap_and_shows_every_group_and_option():
    from omegaconf import OmegaConf

    from experiments.cli import help
    from experiments.inputs import conf_files

    code = "sys.argv = ['run.py', '--help']; from experiments.cli.main import command; command()"
    assert not imported(code) & DEAR
    page = help.text("run.py", [])
    for group in ("decoder", "experiment", "logger", "model", "search", "task"):
        assert f"  {group}: " in page and all(name in page for name in conf_files.files(group))
    options = set(OmegaConf.load(conf_files.CONF / "run.yaml")) - {"defaults", "hydra", "decoder", "logger"}
    assert all(f"\n  {name}:" in page for name in options)


def test_version_is_cheap_and_names_this_package_first():
    from experiments.cli import help

    assert (
        not imported("sys.argv = ['run.py', '--version']; from experiments.cli.main import command; command()") & DEAR
    )
    lines = [line.split(" ", 1) for line in help.version().splitlines()]
    assert [name for name, _ in lines] == ["prunehal", "torch", "transformers"]
    assert lines[1][1] == importlib.metadata.version("torch")
    assert lines[2][1] == importlib.metadata.version("transformers")


def test_the_command_answers_version_itself(monkeypatch, capsys):
    from experiments.cli import main

    monkeypatch.setattr(main, "main", None)  # Hydra, which would print its own
    monkeypatch.setattr(sys, "argv", ["run.py", "--version"])
    main.command()
    assert capsys.readouterr().out.startswith("prunehal ")


def test_the_loops_names_are_there_and_no_others():
    import decoders

    assert decoders.Stack.__name__ == "Stack" and all(hasattr(decoders, name) for name in decoders.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Stacks'"):
        decoders.Stacks  # noqa: B018


def test_one_package_has_all_public_names():
    import baselines
    import decoders
    import prunehal

    for name in prunehal.__all__:
        home = next(m for m in (decoders, baselines, prunehal) if name in m.__all__)
        assert getattr(prunehal, name) is getattr(home, name)
    assert {"Stack", "Decoder", "PruneHal", "OPERA", "VCD", "DoLa", "DeCo", "StackError"} <= set(prunehal.__all__)
    with pytest.raises(ImportError, match="cannot import name 'PruneHall'"):
        from prunehal import PruneHall  # noqa: F401
    assert not imported("import prunehal") & DEAR
