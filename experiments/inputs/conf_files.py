"""The yaml files of `conf`, of other packages, and of the user's own folder: which there are, and what they hold."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from .errors import InputError

_HERE = Path(__file__).resolve().parents[1]


CONF = (
    _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"
)  # in a wheel in this package, in the tree beside it


def foreign() -> dict[str, Path]:
    """Folders of yaml files that other installed packages add to `conf`, by the name of their entry point in the group
    `prunehal.conf`.

    The entry point names the folder as a package: `mine = "my_package.conf"`. Raises InputError for one that is not
    there.
    """
    found = {}
    for point in importlib.metadata.entry_points(group="prunehal.conf"):
        try:
            spec = importlib.util.find_spec(point.value)
        except ImportError as error:
            raise InputError(
                f"the entry point '{point.name}' of prunehal.conf names '{point.value}', which cannot be imported:"
                f" {error}"
            ) from error
        places = list(spec.submodule_search_locations or []) if spec else []
        if not places or not Path(places[0]).is_dir():
            raise InputError(
                f"the entry point '{point.name}' of prunehal.conf names '{point.value}', which is no folder of an"
                " installed package"
            )
        found[point.name] = Path(places[0])
    return found


def _all(group: str, more: Path | None) -> dict[str, Path]:
    folders = [CONF, *foreign().values(), *([] if more is None else [more])]
    return {p.stem: p for folder in folders for p in sorted((folder / group).glob("*.yaml"))}


def files(group: str, more: Path | None = None) -> dict[str, Path]:
    """The choices of a config group, by name; also those in the user's own config folder. A leading underscore marks
    what is only included.
    """
    return {name: path for name, path in _all(group, more).items() if not name.startswith("_")}


def read(group: str, name: str, more: Path | None = None) -> dict:
    """What a file of a group holds, those of its group that its defaults list names merged in."""
    known = _all(group, more)
    own = yaml.safe_load(known[name].read_text()) or {}
    parts = own.pop("defaults", ["_self_"])
    return OmegaConf.to_container(
        OmegaConf.merge(
            *(
                own if part == "_self_" else read(group, part, more)
                for part in parts
                if part == "_self_" or part in known
            )
        )
    )


def own_folder(arguments: list[str]) -> Path | None:
    """The config folder given by Hydra's --config-dir."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = Path(value or following)
            if not folder.is_dir():
                raise InputError(
                    f"--config-dir names '{folder}', which is no folder; it holds yaml files in folders such as"
                    " decoder/"
                )
            return folder
    return None


class Foreign(SearchPathPlugin):
    """The `conf` folders of other packages, which Hydra finds as it finds ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name, folder in foreign().items():
            search_path.append(name, f"file://{folder}")
