"""Where the files of a hub id are. The hub is asked once whether it is there: its client's own retries, file by file,
take minutes.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache

PATIENCE = 5  # seconds


class HubError(OSError):
    """The files are neither in the local cache nor within reach."""


def source(name: str, file: str = "config.json") -> str:
    """What `from_pretrained` is to be given: the name itself where the hub can be reached, or where it is a folder;
    else the folder of the local cache that holds it.

    Args:
        name: a hub id, or a folder.
        file: one that the model has in any case.

    Raises:
        HubError: where it can be had from neither.
    """
    if Path(name).is_dir() or (why := _away()) is None:
        return name
    found = try_to_load_from_cache(name, file)
    if isinstance(found, str):
        return str(Path(found).parent)
    raise HubError(
        f"it is not in the local cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached ({why})"
    )


def _away() -> str | None:
    """Why the hub cannot be reached, or None; any answer counts as one."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of the client's own kinds, and the client differs from version to version
        return str(error) or type(error).__name__
    return None
