"""The model that lmms-eval talks to: a config of run.py, its stack, and batches of requests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import hydra
import torch
from accelerate import Accelerator
from hydra.core.plugins import Plugins
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from tqdm import tqdm

from decoders.errors import choices

from ... import models
from ...cli.arguments import check
from ...inputs import conf_files
from ...inputs.conf_files import Foreign
from ...inputs.errors import InputError
from ...runner import generate, setup
from ...tasks.base import Item, flat

MARKER = "<image>"  # where tasks put a picture into a text
FILLER = "\n\n"  # what lmms-eval takes for a task's `until` where it names none; its own models go on there, too
ALWAYS = (
    "num_beams",
    "length_penalty",
    "early_stopping",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
)
SAMPLING = ("top_p", "top_k", "min_p")
ANSWERS = ("num_return_sequences", "n", "best_of")
WHOLE = (
    "decoder",
    "model",
    "search",
    "max_new_tokens",
)  # of run.py's options those that this model has; the others are lmms-eval's affair


def words(arguments: dict[str, Any]) -> list[str]:
    """Words of run.py's command line from `model_args`: `pretrained` is `model.path`, and an option that every model
    has may leave out `model.`

    Raises InputError for an option that there is not, or that lmms-eval has itself.
    """
    own = conf_files.read("model", "_base")
    found = []
    for key, value in arguments.items():
        bare = key.lstrip("+~")
        value = (
            f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else "null" if value is None else value
        )
        if bare == "pretrained":
            key, value = "model.path", "'" + str(value).replace("'", r"\'") + "'"
        elif bare in own:
            key = f"model.{key}"
        elif bare.split(".")[0] not in WHOLE:
            valid = [*WHOLE, "pretrained", "config_dir", *own]
            raise InputError(
                choices(key, valid, "option of model_args")
                + " Tasks, limits, seeds and folders are options of lmms-eval itself: --tasks, --limit, --seed,"
                " --output_path."
            )
        found.append(f"{key}={value}")
    if "pretrained" in arguments and "model" not in arguments:
        found.append("model=auto")
    return found


def compose(arguments: dict[str, Any]) -> DictConfig:
    """run.py's config for `model_args`; `config_dir` is a folder of yaml files of one's own, as run.py's --config-dir.
    Raises InputError as run.py does.
    """
    arguments = dict(arguments)
    folder = arguments.pop("config_dir", None)
    typed = words(arguments)
    check([*([f"--config-dir={folder}"] if folder else []), *typed], writes=False)
    Plugins.instance().register(Foreign)
    try:
        with hydra.initialize_config_dir(str(conf_files.CONF), version_base="1.3"):
            cfg = hydra.compose(
                "run", [*([f"hydra.searchpath=['file://{Path(folder).resolve()}']"] if folder else []), *typed]
            )
        OmegaConf.resolve(cfg)
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        raise InputError(f"model_args do not go together: {str(error.__cause__ or error).splitlines()[0]}") from error
    return cfg


def options(
    cfg: DictConfig, typed: Iterable[str], asked: dict[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What `generate` is given for a task's generation arguments, the strings at which answers end, and the arguments
    that change nothing.

    What was typed in model_args goes before what the task says: `search` as a whole, and `max_new_tokens`. Without them
    the task decides, over run.py's defaults: it samples where its temperature is above 0, unless it says
    do_sample=false.

    Args:
        typed: keys of model_args.

    Raises:
        InputError: for several answers a request.
    """
    asked, out, keys = (
        {k: v for k, v in asked.items() if v is not None},
        setup.options(cfg),
        {key.lstrip("+~").split(".")[0] for key in typed},
    )
    until = asked.pop("until", [])
    ends = [end for end in ([until] if isinstance(until, str) else until) if end and end != FILLER]
    for name in ANSWERS:
        if asked.pop(name, 1) != 1:
            raise InputError(f"{name}: a request has one answer; lmms-eval's --repeats asks several times")
    if "max_new_tokens" not in keys:
        out["max_new_tokens"] = int(asked.pop("max_new_tokens", out["max_new_tokens"]))
    if "search" not in keys:
        wanted = asked.pop("do_sample", None)
        temperature = float(asked.pop("temperature", 1 if wanted else 0))
        if temperature > 0 and wanted is not False:
            out |= conf_files.read("search", "sampling") | {"temperature": temperature}
        given = {name: asked.pop(name) for name in (*ALWAYS, *SAMPLING) if name in asked}
        out |= {name: value for name, value in given.items() if name in ALWAYS or out["do_sample"]}
    return out, ends, [f"{name}={value}" for name, value in asked.items() if value != out.get(name, 0)]


def messages(content: list[dict], where: str) -> tuple[list[dict], list[Image.Image]]:
    """A chat for a processor, and its pictures in their order, from lmms-eval's messages; pictures go where a user's
    text has `<image>`, as many as there are.
    """
    chat, pictures = [], []
    for message in content:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        if other := [part["type"] for part in parts if part["type"] not in ("image", "text")]:
            raise InputError(f"{where} holds a visual of the kind {other[0]}; this model sees pictures and text only")
        pictures += [_picture(part["url"], where) for part in parts if part["type"] == "image"]
        chat.append({"role": message["role"], "content": list(_placed(parts, where))})
    return chat, pictures


def _placed(parts: list[dict], where: str) -> Iterator[dict]:
    image, count = {"type": "image"}, sum(part["type"] == "image" for part in parts)
    marks = sum(part["text"].count(MARKER) for part in parts if part["type"] == "text")
    if marks and marks != count:
        raise InputError(f"{where} has {marks} times {MARKER} in its text, and {count} pictures")
    for part in parts:
        if part["type"] == "image":
            if not marks:
                yield image
            continue
        for n, text in enumerate(part["text"].split(MARKER)):
            if n:
                yield image
            if text:
                yield {"type": "text", "text": text}


def _picture(source: Any, where: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return flat(source)
    if not isinstance(source, (str, Path)):
        raise InputError(f"{where} has a picture of the kind {type(source).__name__}; pictures are PIL images or files")
    try:
        return Item(where, None, Path(source)).open()
    except OSError as error:
        raise InputError(f"{where}: {error}") from error


def _kind(visual: Any) -> str:
    """What a task's doc_to_visual gave, in the words of its messages: files are told by their names, as lmms-eval
    does.
    """
    if (
        isinstance(visual, Image.Image)
        or isinstance(visual, (str, Path))
        and Path(visual).suffix.lower() in Image.registered_extensions()
    ):
        return "image"
    return "video" if isinstance(visual, (str, Path)) else type(visual).__name__


class Simple(lmms):
    """A stack on a model, for tasks that give a text and pictures, which are put before it.

    Args:
        batch_size: requests that are answered together.
        arguments: run.py's options `decoder`, `model`, `search`, `max_new_tokens` and what is below them, as in
            'decoder=[a,b],decoder.a.option=1,search=beam'; `pretrained`, a hub id or a folder, and options of the model
            without `model.`: dtype, device, attn_implementation, ...; `config_dir`.

    Raises:
        InputError: as run.py, for what there is not, what cannot be loaded, and a decoder that cannot act on the model.
    """

    is_simple = True

    def __init__(self, batch_size: int | str = 1, **arguments: Any) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is an integer >= 1, not {batch_size!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if (
            self.world_size > 1
            and torch.cuda.is_available()
            and not {"device", "device_map", "model.device", "model.device_map"} & arguments.keys()
        ):
            arguments["device"] = f"cuda:{self.accelerator.local_process_index}"
        self.typed, self.cfg = list(arguments), compose(arguments)
        setup.options(self.cfg)
        self.plan = generate.plan(self.cfg.decoder, self.cfg.compile)
        self.model, self.processor = models.load(self.cfg.model)
        generate.refuse([self.plan], self.model)
        self.device, self.template = self.model.device, models.template(self.cfg.model)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests. What goes wrong is raised."""
        asked = [self._asked(request) for request in requests]
        key = [json.dumps(kwargs, sort_keys=True, default=str) for kwargs in asked]
        order = sorted(range(len(requests)), key=lambda i: (key[i], -len(requests[i].args[0])))
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for _, alike in itertools.groupby(order, key.__getitem__):
                alike = list(alike)
                arguments, ends, ignored = options(self.cfg, self.typed, asked[alike[0]])
                if ignored:
                    logger.warning(
                        f"{requests[alike[0]].task_name}: of its generation arguments these change nothing:"
                        f" {', '.join(ignored)}"
                    )
                for at in range(0, len(alike), self.batch_size):
                    part = alike[at : at + self.batch_size]
                    for i, answer in zip(
                        part, self._answers([requests[i] for i in part], arguments, ends), strict=False
                    ):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", (requests[i].args[0], asked[i]), answer.text)
                    bar.update(len(part))
        return [answers[i] for i in range(len(requests))]

    def _answers(self, requests: list[Instance], arguments: dict, ends: list[str]) -> list[GenerationResult]:
        """Answers of one batch; those with pictures and those without are given to the model apart."""
        rows = [
            messages(self._messages(request), f"document {request.doc_id} of {request.task_name}")
            for request in requests
        ]
        out: dict[int, GenerationResult] = {}
        for pictured in (True, False):
            those = [i for i, (_, pictures) in enumerate(rows) if bool(pictures) == pictured]
            if those:
                out |= zip(
                    those,
                    self._generated([requests[i] for i in those], [rows[i] for i in those], arguments, ends),
                    strict=False,
                )
        return [out[i] for i in range(len(requests))]

    def _generated(
        self, requests: list[Instance], rows: list[tuple], arguments: dict, ends: list[str]
    ) -> Iterator[GenerationResult]:
        inputs = models.encode(
            self.processor, [pictures for _, pictures in rows], [chat for chat, _ in rows], self.device, self.template
        )
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        seeds = [crc32(f"{request.task_name} {request.doc_id}".encode()) for request in requests]
        stop = {"stop_strings": ends} if ends else {}
        out = self.plan.stack.generate(
            self.model, **inputs, **arguments, **stop, seeds=seeds, tokenizer=self.processor
        )[:, inputs["input_ids"].shape[1] :]
        for prompt, ids in zip(inputs["attention_mask"].sum(-1).tolist(), out.tolist(), strict=False):
            ids = generate.spoken(self.model, ids)
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            for end in ends:
                text = text.split(end)[0]
            yield GenerationResult(text.strip(), TokenCounts(input_tokens=prompt, output_tokens=len(ids)))

    def _asked(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _messages(self, request: Instance) -> list[dict]:
        context, _, visual, document, task, split = request.args
        found = visual(self.task_dict[task][split][document]) or []
        return [
            {
                "role": "user",
                "content": [*({"type": _kind(one), "url": one} for one in found), {"type": "text", "text": context}],
            }
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "a stack decides how answers are decoded, so it has no log-likelihood of given ones: choose a task with"
            " output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("several rounds are not supported: choose a task with output_type generate_until")


class Chat(Simple):
    """The same for lmms-eval's messages, in which pictures and text alternate, turns too where the processor's chat
    template takes them.
    """

    is_simple = False

    def _asked(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _messages(self, request: Instance) -> list[dict]:
        _, made, _, document, task, split = request.args
        return made(self.task_dict[task][split][document])
