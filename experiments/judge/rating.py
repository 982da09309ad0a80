"""Have the answers of a file rated, and sum the ratings up."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ..inputs.errors import InputError
from ..inputs.reading import fields, lines, parse
from ..metrics import bootstrap
from ..runner.progress import progress
from ..tasks import Item
from .endpoint import Endpoint
from .prompts import BENCHES, ratings

SIDE = 1024  # longest side of the picture that is sent


def picture(item: Item) -> dict:
    """The part of a request that shows a picture, as a data URL. Raises InputError for one that cannot be read."""
    try:
        image = item.open()
    except OSError as error:
        raise InputError(f"the picture of '{item.id}' cannot be read: {error}") from error
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=92)
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()},
    }


def answers(file: Path) -> list[dict]:
    """Rows with `image` and `caption` from a file of JSON lines; `stack` is added where there is none. Raises
    InputError with the number of a broken line.
    """
    rows = []
    for _, where, value in lines(file, "the file of answers"):
        row = fields(value, ("image", "caption"), where)
        if not isinstance(row["caption"], str):
            raise InputError(f"{where} has a caption that is no text: {json.dumps(row['caption'])[:40]}")
        rows.append({"stack": "answers"} | row)
    if not rows:
        raise InputError(f"'{file}' holds no answers; run.py writes them into captions.jsonl")
    return rows


def key(row: dict) -> tuple[str, str, str]:
    """What a rating belongs to: stack, item, and the answer itself."""
    return row["stack"], str(row["image"]), hashlib.sha256(row["caption"].encode()).hexdigest()[:12]


def rated(file: Path, bench: str, model: str) -> dict[tuple, dict]:
    """The ratings in a file, by `key`; a last line that was not written to its end is cut off. Raises InputError for
    the ratings of another judge.
    """
    if not file.exists():
        return {}
    held = file.read_bytes()
    if held and not held.endswith(b"\n"):
        whole = held.rfind(b"\n") + 1
        with file.open("r+b") as out:
            out.truncate(whole)
        held = held[:whole]
    found = {}
    for number, line in enumerate(held.decode("utf-8", errors="replace").split("\n")[:-1], 1):
        where = f"'{file}', line {number},"
        row = fields(parse(line, where), ("stack", "image", "answer", "bench", "judge", "ratings"), where)
        if (row["bench"], row["judge"]) != (bench, model):
            raise InputError(
                f"'{file}' holds ratings of '{row['bench']}' by '{row['judge']}', not of '{bench}' by '{model}'; choose"
                " another --out"
            )
        found[row["stack"], row["image"], row["answer"]] = row
    return found


def judge(
    rows: Sequence[dict], pictures: dict[str, Item], bench: str, endpoint: Endpoint, out: Path, console: Console
) -> dict[tuple, dict]:
    """Have rows rated that are not yet, and append each rating to `out` as it comes; returns all ratings of these rows
    by `key`.

    Args:
        rows: as from `answers`, with what the bench needs.
        pictures: an item for each row's `image`, where the judge is to see it.
    """
    asked, done = BENCHES[bench], rated(out, bench, endpoint.model)
    wanted = {key(row): row for row in rows}
    for row in wanted.values():
        fields(row, asked.needs, f"the answer to '{row['image']}'")
        if asked.picture and str(row["image"]) not in pictures:
            raise InputError(
                f"there is no picture for '{row['image']}'; name the folder of pictures with --images, or their task"
                " with --task"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    lacking = [k for k in wanted if k not in done]
    if len(lacking) < len(wanted):
        console.print(
            f"{len(wanted) - len(lacking)} of {len(wanted)} answers are rated in {out}", style="dim", markup=False
        )
    with progress(console) as bar, out.open("a", encoding="utf-8") as file:
        job = bar.add_task(f"{endpoint.model}, {bench}", total=len(lacking))
        for k in lacking:
            row = wanted[k]
            shown = [picture(pictures[str(row["image"])])] if asked.picture else []
            reply = endpoint.ask([{"type": "text", "text": asked.ask(row)}, *shown])
            done[k] = {
                "stack": k[0],
                "image": k[1],
                "answer": k[2],
                "bench": bench,
                "judge": endpoint.model,
                "ratings": ratings(reply, asked),
                "reply": reply,
            }
            file.write(json.dumps(done[k], ensure_ascii=False) + "\n")
            file.flush()
            bar.advance(job)
    return {k: done[k] for k in wanted}


def summary(rows: Sequence[dict], found: dict[tuple, dict], bench: str) -> dict[str, dict]:
    """By stack: the mean of each rating with its 95 % interval over pictures, `n`, and `unclear`, replies without a
    clear rating, which are left out.
    """
    names = list(BENCHES[bench].scales)

    def rates(total: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = {name: total[..., i + 1] / total[..., 0] for i, name in enumerate(names)}
            return means | ({"hallucinated_percent": 100 * total[..., -1] / total[..., 0]} if bench == "mmhal" else {})

    out = {}
    for stack in dict.fromkeys(row["stack"] for row in rows):
        mine = {key(row): row for row in rows if row["stack"] == stack}
        clear = [(row, found[k]["ratings"]) for k, row in mine.items() if found[k]["ratings"] is not None]
        table = np.array([[1, *(r[name] for name in names), r[names[0]] < 3] for _, r in clear], float).reshape(
            -1, len(names) + 2
        )
        out[stack] = bootstrap.summary(table, rates, [row.get("picture") or row["image"] for row, _ in clear]) | {
            "unclear": len(mine) - len(clear)
        }
    return out
