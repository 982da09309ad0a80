"""What `python run.py --help` and `--version` show. Hydra's own page of help takes seconds, as it composes the
configuration once a group.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from ..inputs import conf_files

_HEAD = """\
Describe images with a stack of decoders, and measure what is hallucinated.

Usage: {program} [group=choice] [option=value] [group.option=value] [flag]

  {program}                                      the embedded model, PruneHal beside plain decoding
  {program} 'decoder=[opera,prunehal]' model=llava15_7b search=beam
  {program} image=photo.jpg show=true            one image, and a page of it in the browser
  {program} decoder.prunehal.r=0.4,0.7 --multirun

Groups (group=choice)
"""
_TAIL = """
Flags
  --cfg job        show the whole configuration that these arguments make, and stop
  --multirun, -m   run every combination of values that are given as a,b,c
  --config-dir     a folder of your own with decoder/NAME.yaml, model/NAME.yaml, ...
  --version        the versions of this package, torch and transformers
  --hydra-help     Hydra's own flags
"""


def version() -> str:
    """What `--version` shows; of a package that is not installed, as in a checkout, that it is not."""
    shown = []
    for name in ("prunehal", "torch", "transformers"):
        try:
            shown.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            shown.append(f"{name} (not installed)")
    return "\n".join(shown)


def text(program: str, arguments: list[str]) -> str:
    """The page, with the choices of installed packages and of the folder that --config-dir names.

    Args:
        program: What the user typed to start it.
        arguments: The words that follow.

    Raises:
        InputError: --config-dir names no folder.
    """
    more = conf_files.own_folder(arguments)
    groups = sorted(folder.name for folder in conf_files.CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
    lines = [_HEAD.format(program=program).rstrip("\n")]
    for group in groups:
        lines.append(f"  {group}: {', '.join(sorted(conf_files.files(group, more)))}")
    lines += ["", "Options (option=value), with their defaults", *(f"  {line}" for line in _options()), _TAIL.rstrip()]
    return "\n".join(lines)


def _options() -> list[str]:
    """The options of conf/run.yaml with their comments."""
    lines = Path(conf_files.CONF / "run.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("results:"))
    return lines[start : lines.index("hydra:") - 1]
