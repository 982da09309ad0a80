"""The csv files and plots of studies, of the answers in a store.

Nothing is generated for them but the few answers whose pruned patches are drawn. Models in folders must be where they
were when the studies ran, since runs are known by the digests of their files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.utils import instantiate
from rich.console import Console
from rich.text import Text

from decoders.errors import choices

from ..inputs import conf_files
from ..inputs.errors import InputError
from ..results import Results
from ..studies import Cell, Report
from ..studies.cells import reported, study_cells


def write_tables(names: Sequence[str], store: Results, console: Console, folder: Path) -> list[str]:
    """Write the files of each study that the store holds completely, and say so of each study.

    Args:
        names: studies of `conf/experiment`.
        folder: where NAME-1.csv and on, NAME.png and NAME.json go; files of studies that are not written stay.

    Returns:
        The names of the studies that were written.

    Raises:
        InputError: for a name that is no study.
    """
    known, written = conf_files.files("experiment"), []
    for name in names:
        if name not in known:
            raise InputError(choices(name, known, "experiment"))
    with hydra.initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
        for name in names:
            if why := _write(name, store, console, folder):
                console.print(Text(f"{name}: its files stay; {why}"), soft_wrap=True)
            else:
                written.append(name)
    return written


def _write(name: str, store: Results, console: Console, folder: Path) -> str | None:
    """Write a study's files; or why not."""
    study = instantiate(hydra.compose("run", [f"experiment={name}"]).experiment)
    try:
        cells = study_cells(study, [], store, console)
    except InputError as error:  # a model that is not there
        return str(error)
    if lacking := sum(cell.lacking(store) for cell in cells.values()):
        return f"the store lacks {lacking} answers (python run.py experiment={name})"
    report = reported(study, cells, store, console, folder)
    kept = {folder / f"{name}-{number}.csv" for number in range(1, len(report.sheets) + 1)}
    for old in set(folder.glob(f"{name}-*.csv")) - kept:
        old.unlink()
    (folder / f"{name}.json").write_text(json.dumps(_about(name, report, cells, store), indent=1) + "\n")
    console.print(Text(f"{name}: {len(report.sheets)} tables"))
    return None


def _about(name: str, report: Report, cells: dict[str, Cell], store: Results) -> dict:
    """What a page has to say beside a study's tables."""
    runs = {cell.run.id: cell.run for cell in cells.values()}
    return {
        "title": report.title,
        "command": f"python run.py experiment={name}",
        "on": report.on,
        "pictures": sorted({len({row["picture"] for row in cell.rows}) for cell in cells.values()}),
        "tables": [sheet.title for sheet in report.sheets],
        "pages": [page.name for page in report.pages],
        "code": sorted(store.codes(runs)),
        "versions": sorted({f"{k} {v}" for run in runs.values() for k, v in run.versions.items()}),
    }
