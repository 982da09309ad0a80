"""DOC"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from decoders.errors import choices

from ..inputs.errors import InputError, say
from ..tasks import Item
from .endpoint import Endpoint
from .prompts import BENCHES
from .rating import answers, judge, summary


def _pictures(args: argparse.Namespace, rows: list[dict]) -> dict[str, Item]:
    """The items whose pictures are to be seen; a task's items also give rows what they lack. Raises InputError."""
    if args.task:
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        from ..inputs import conf_files

        known = conf_files.files("task")
        if args.task not in known:
            raise InputError(choices(args.task, known, "task"))
        own, given = OmegaConf.create(conf_files.read("task", args.task)), OmegaConf.from_dotlist(args.set)
        for key in given:
            if key not in own:
                raise InputError(choices(key, [k for k in own if k != "_target_"], f"option of the task '{args.task}'"))
        task = instantiate(OmegaConf.merge(own, given))
        items = {item.id: item for item in task.items()}
        for row in rows:
            if str(row["image"]) in items:
                item = items[str(row["image"])]
                row.update(
                    {
                        name: value
                        for name, value in ({"question": item.question} | item.truth).items()
                        if row.get(name) is None
                    }
                )
        return items
    if args.images:
        folder = Path(args.images).expanduser()
        names = {str(row["image"]): str(row.get("picture") or row["image"]) for row in rows}
        missing = [name for name in names.values() if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} pictures are missing in '{args.images}': {', '.join(missing[:3])};"
                " --task reads the pictures of a task"
            )
        return {i: Item(i, None, folder / name) for i, name in names.items()}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.judge", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "file", type=Path, help="answers, a JSON line each with image and caption, as run.py writes captions.jsonl"
    )
    parser.add_argument("--bench", choices=BENCHES, default="describe", help="what is rated")
    parser.add_argument(
        "--images", help="the folder of the pictures, under the names that the answers have as picture or image"
    )
    parser.add_argument("--task", help="a task of conf/task, whose pictures, questions and reference answers are used")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of that task, as in --set images=FOLDER"
    )
    parser.add_argument("--url", required=True, help="the endpoint, as in https://api.openai.com/v1")
    parser.add_argument("--model", required=True, help="the judge")
    parser.add_argument("--out", type=Path, required=True, help="where ratings are kept, a JSON line each")
    parser.add_argument(
        "--key-env",
        default="OPENAI_API_KEY",
        help="the environment variable that holds the key (OPENAI_API_KEY); none: no key is sent",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the judge; -1: not sent, for models that take none"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        secret = None if args.key_env == "none" else os.environ.get(args.key_env)
        if args.key_env != "none" and not secret:
            raise InputError(
                f"no key: the environment variable {args.key_env} is not set. Set it, name another with --key-env, or"
                " say --key-env none for an endpoint that wants no key"
            )
        endpoint = Endpoint(
            args.url, args.model, secret, args.temperature if args.temperature >= 0 else None, args.timeout
        )
        rows = answers(args.file)
        found = judge(rows, _pictures(args, rows), args.bench, endpoint, args.out, console)
    except InputError as error:
        return say(error)
    except KeyboardInterrupt:
        return 130
    scores = summary(rows, found, args.bench)
    table = Table("stack", "rating", "mean", "95 %", "n", "unclear")
    for stack, score in scores.items():
        for name in (k for k, v in score.items() if isinstance(v, dict)):
            value = score[name]
            table.add_row(
                Text(stack),
                name,
                f"{value['value']:.2f}",
                f"{value['low']:.2f} to {value['high']:.2f}",
                str(score["n"]),
                str(score["unclear"]),
            )
        if not score["n"]:
            table.add_row(Text(stack), "", "", "", "0", str(score["unclear"]))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
