"""Check the command line before Hydra does, whose messages name neither the nearest valid name nor all of them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from decoders.errors import choices

from ..inputs.conf_files import CONF, files, own_folder, read
from ..inputs.errors import InputError

FREE = ("settings", "random")  # of a model: what they hold differs from one to the next


PLUGINS = {  # Hydra's own, by what they are called on the command line
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
        "ray": "hydra-ray-launcher",
    },
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper"},
    "hydra/sweeper/sampler": {},
}


def ordered(arguments: list[str]) -> list[str]:
    """Flags first: Hydra does not take overrides on both sides of one (`image=x -m search=greedy,beam`)."""
    ours = [a for a in arguments if "=" in a and not a.startswith("-")]
    return [a for a in arguments if a not in ours] + ours


def check(arguments: list[str], writes: bool = True) -> None:
    """Raise InputError for an unknown group choice, decoder, option or key, or, where something is written, an output
    folder that cannot be.
    """
    more, overrides = own_folder(arguments), _parsed(arguments)
    groups = [p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra"]
    root = yaml.safe_load((CONF / "run.yaml").read_text())
    chosen = {next(iter(d)): next(iter(d.values())) for d in root["defaults"] if isinstance(d, dict)}
    keys = {k for k in root if k not in ("defaults", "hydra")} | set(groups)
    many = any(a in ("-m", "--multirun") for a in arguments)
    for override in overrides:
        key = override.key_or_group
        _check_hydra(override, many, more)
        if override.is_add() or override.is_delete() or key.startswith("hydra/") or key.split(".")[0] == "hydra":
            continue
        if key in groups:
            chosen[key] = _checked_choices(override, more)
        elif key.split(".")[0] not in keys:
            raise InputError(choices(key, keys, "option"))
    for override in overrides:
        if not override.is_add():
            _check_nested(override.key_or_group.split("."), groups, chosen, more)
    _check_sweeper(overrides)
    if writes:
        place, folder = ("hydra.sweep.dir", "multirun") if many else ("hydra.run.dir", "outputs")
        for override in overrides:
            plain = not (override.is_add() or override.is_delete() or override.is_sweep_override())
            if override.key_or_group == place and plain:
                folder = str(override.value())
        check_folder(Path(folder.split("$")[0]), place)


def _parsed(arguments: list[str]) -> list[Override]:
    """The overrides among the arguments."""
    words = [a for a in arguments if not a.startswith("-") and "=" in a]
    try:
        return OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise InputError(
            f"could not read the command line: {str(error).splitlines()[0]}\nQuote lists for the shell:"
            " 'decoder=[prunehal]', and text with braces, brackets, commas or colons twice: 'model.prompt=\"Is it red,"
            " or blue?\"'"
        ) from error


def _check_hydra(override: Override, many: bool, more: Path | None) -> None:
    """Sweepers and launchers are for many runs, and must be installed."""
    key = override.key_or_group
    if override.is_delete():
        return
    if key in ("hydra/sweeper", "hydra/launcher") and not many and override.value() not in ("basic", None):
        raise InputError(f"{key}={override.value()} is for many runs; add -m, or leave it out")
    if key in PLUGINS and isinstance(override.value(), str):
        _check_plugin(key, override.value(), more)


def _checked_choices(override: Override, more: Path | None) -> list[str]:
    """The files of a group that an override names; all of a sweep."""
    group = override.key_or_group
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    named = [_names(value) for value in values]
    for some in named:
        if twice := [name for i, name in enumerate(some) if name in some[:i]]:
            raise InputError(
                f"'{group}=[{','.join(some)}]' names {twice[0]} twice; name it once. For two with other options give"
                f" the second a yaml of its own, FOLDER/{group}/NAME.yaml, and --config-dir=FOLDER"
            )
    names = [name for some in named for name in some]
    for name in names:
        if name not in files(group, more):
            raise InputError(choices(name, files(group, more), group))
    return names


def _check_sweeper(overrides: list[Override]) -> None:
    """Counts of jobs and trials, and a metric for those that search."""
    given = {o.key_or_group: o.value() for o in overrides if not o.is_sweep_override()}
    for key in ("hydra.launcher.n_jobs", "hydra.sweeper.n_jobs", "hydra.sweeper.n_trials"):
        value = given.get(key, 1)
        if value == 0 or (key.endswith("n_trials") and isinstance(value, int) and value < 0):
            raise InputError(f"{key} cannot be {given[key]}")
    if given.get("hydra/sweeper", "basic") not in ("basic", None) and given.get("objective") is None:
        raise InputError(
            f"hydra/sweeper={given['hydra/sweeper']} searches for the best value of a metric; name it: objective=f1"
        )


def _check_plugin(group: str, name: str, more: Path | None) -> None:
    """A launcher, sweeper or sampler must be there: a plugin of Hydra's that is installed, or a yaml of ours on top of
    one.
    """
    Plugins.instance()  # has those that are installed tell their names
    own, packages = files(group, more), PLUGINS[group]
    try:
        there = {
            choice.removesuffix(".yaml") for choice in ConfigStore.instance().list(group) if choice.endswith(".yaml")
        }
    except OSError:  # no plugin has told of any
        there = set()
    valid = there | own.keys() | packages.keys()
    if valid and name not in valid:
        raise InputError(choices(name, valid, group))
    base = (
        next(part for part in yaml.safe_load(own[name].read_text())["defaults"] if part != "_self_")
        if name in own
        else name
    )
    if base in packages and base not in there:
        raise InputError(f"{group}={name} needs a package that is not installed: pip install {packages[base]}")
    if base == "submitit_slurm" and not shutil.which("sbatch"):
        raise InputError(f"{group}={name} needs Slurm, and there is no sbatch here; run it on a node that submits jobs")


def _names(value) -> list[str]:
    if isinstance(value, str) and value.startswith("["):  # a swept list arrives as its text
        value = [v.strip() for v in value.strip("[]").split(",") if v.strip()]
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _check_nested(parts: list[str], groups: list[str], chosen: dict, more: Path | None) -> None:
    """`decoder.NAME.option=...` and `model.option=...` must name what the chosen yaml holds."""
    if len(parts) < 2 or parts[0] not in groups:
        return
    if chosen.get(parts[0]) is None:
        raise InputError(f"'{'.'.join(parts)}' is of a choice of {parts[0]}; choose one: {parts[0]}=NAME")
    names = chosen[parts[0]] if isinstance(chosen[parts[0]], list) else [chosen[parts[0]]]
    tree: dict = {}
    for name in names:
        tree |= read(parts[0], name, more)
    if all(name in tree for name in names) and parts[1] not in tree:  # a group of which several are chosen
        raise InputError(_not_chosen(parts, names, more))
    for depth, part in enumerate(parts[1:], 1):
        free = parts[0] == "model" and depth > 1 and parts[1] in FREE
        if not isinstance(tree, dict) and not free:
            return
        tree = tree if isinstance(tree, dict) else {}
        if part not in tree:
            if free:
                raise InputError(
                    f"model={names[0]} does not state {'.'.join(parts)}; add it with a plus: '+{'.'.join(parts)}=VALUE'"
                )
            raise InputError(
                choices(".".join(parts), [".".join([*parts[:depth], k]) for k in tree if k != "_target_"], "option")
            )
        tree = tree[part]


def _not_chosen(parts: list[str], names: list[str], more: Path | None) -> str:
    """What to do about an option of a file that the list of a group does not name."""
    group, name, word = parts[0], parts[1], ".".join(parts)
    if name not in files(group, more):
        return f"{word}: {choices(name, files(group, more), group)}"
    there = list(dict.fromkeys(names))
    return (
        f"'{word}' is an option of {name}, which is not in {group}=[{','.join(there)}]. Add it:"
        f" '{group}=[{','.join([*there, name])}]', or leave {word} out."
    )


def check_folder(folder: Path, option: str, what: str = "FOLDER") -> None:
    """Make a folder if need be. Raises InputError where nothing can be written into it; `what` is what the option
    names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder '{folder}' ({error.strerror}); choose another: {option}={what}"
        ) from error
