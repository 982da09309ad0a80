"""The page of a run, `report=FILE.html`, and `show=true`, which opens it."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from ..inputs.errors import InputError
from ..report import build
from ..results import Results, Run
from . import arguments

NAME = "report.html"  # in the output folder, where only `show` asks for a page


def file(cfg: DictConfig, folder: Path) -> Path | None:
    """Where the page goes, or None where none is asked for: `report`, in a multirun within the job's own folder.

    Raises InputError where it cannot be written, before anything else is done.
    """
    if cfg.report is None:
        return folder / NAME if cfg.show else None
    if not isinstance(cfg.report, str) or Path(cfg.report).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"report names the page that is to be written, FILE.html, not {cfg.report!r}")
    many = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    out = (folder if many else Path()) / Path(cfg.report).expanduser()
    if out.is_dir():
        raise InputError(f"report={cfg.report} is a folder; name a file in it: report={Path(cfg.report) / NAME}")
    arguments.check_folder(out.parent, "report", "FILE.html")
    return out


def write(
    out: Path, show: bool, store: Results, runs: Iterable[Run], batch_size: int, load: Callable, console: Console
) -> None:
    """Write the page of runs that the store has, in place of an older one, and open it in the browser if it is to be
    shown. Ctrl-C ends the making of maps, and is raised once the page is written.
    """
    labelled = build.labelled([store.run(run.id) for run in runs])
    made, stopped = build.page(store, labelled, console, batch_size=min(build.BATCH, batch_size), load=load)
    build.save(made, out)
    build.tell(made, out, console)
    if show:
        open_page(out, console)
    if stopped:
        raise KeyboardInterrupt


def open_page(out: Path, console: Console) -> None:
    """Open a page in the browser, or say where it is. A screen is needed: browsers that draw in the terminal would take
    it over.
    """
    screen = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    place = out.resolve().as_uri()
    if not ((screen or sys.platform in ("darwin", "win32")) and webbrowser.open(place)):
        console.print(Text(f"there is no browser here; open {place}"), soft_wrap=True)
