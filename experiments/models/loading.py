"""Load a vision-language model and its processor, or build one of the same architecture without a download."""

from __future__ import annotations

import hashlib
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub.errors import StrictDataclassError
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import is_accelerate_available, is_bitsandbytes_available, is_peft_available

from decoders import hf
from decoders.errors import choices

from ..inputs import conf_files
from ..inputs.errors import InputError
from . import hub, processors

ROOT = Path(__file__).resolve().parents[2]


DTYPES = ("bfloat16", "float16", "float32")


def entry(name: str) -> DictConfig:
    """The entry `conf/model/NAME.yaml`, what it includes merged in, as run.py gets it."""
    if name not in conf_files.files("model"):
        raise InputError(choices(name, conf_files.files("model"), "model"))
    return OmegaConf.create(conf_files.read("model", name))


def load(config):
    """The model and processor of a `conf/model` entry, in evaluation mode.

    With `weights: random`, what the model says means nothing: only its speed, memory and shapes are those of the
    architecture.

    Raises:
        InputError: if the model cannot be reached, an option has no such value or needs a package that is missing; says
            what to do.
    """
    check(config)
    dtype, device = _dtype(config), _device(config)
    if config.weights == "random":
        settings, processor = _architecture(config)
        with torch.device(device):
            return _bare(settings, dtype, config.attn_implementation), processor
    path, more = _path(config), dict(trust_remote_code=config.trust_remote_code)
    places = (
        {"device_map": config.device_map or device} | _quantized(config, dtype)
        if config.device_map or config.quantization
        else {}
    )
    if places and not is_accelerate_available():
        raise InputError("model.device_map and model.quantization need the package accelerate: pip install accelerate")
    if config.adapter and not is_peft_available():
        raise InputError("model.adapter needs the package peft: pip install peft")
    try:
        path = hub.source(path)
        processor = processors.load(path, **more)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=config.attn_implementation, **places, **more
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unreachable(config, error) from error
    if config.adapter:
        try:
            model.load_adapter(hub.source(config.adapter, "adapter_config.json"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"could not load the adapter '{config.adapter}': {first_line(error)}\nIt is a folder with"
                " adapter_config.json, or a hub id, of a PEFT adapter for this model."
            ) from error
    processor.tokenizer.padding_side = "left"
    return (model if places else model.to(device)).eval(), processor


def identity(config) -> dict:
    """What decides what a model says: its entry without where it runs, and digests of its local files, of large ones
    the first and last MiB.

    Of a hub id only the name is known: clear the cache or name another store when its files change there.
    """
    kept = {
        k: v
        for k, v in OmegaConf.to_container(config, resolve=True).items()
        if k not in ("device", "device_map", "settings", "unsupported", "random", "build")
    }
    if config.weights != "random" and (_built(config) or local(config)):
        kept["files"] = _digests(Path(_path(config)))
    if config.adapter and Path(config.adapter).is_dir():
        kept["adapter files"] = _digests(Path(config.adapter))
    return kept


def _digests(folder: Path) -> dict[str, str]:
    return {
        file.name: file_digest(file)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    }


def file_digest(file: Path) -> str:
    """Twelve hex digits of a file's size, its first and its last MiB."""
    with file.open("rb") as data:
        found = hashlib.sha256(str(file.stat().st_size).encode() + data.read(2**20))
        data.seek(max(0, file.stat().st_size - 2**20))
        found.update(data.read())
    return found.hexdigest()[:12]


def skeleton(config):
    """The model on the meta device, in its dtype, and its processor; no weight is allocated.

    The architecture is that of the folder that `path` names, else the entry's figures (`random`), else the hub's.

    Raises:
        InputError: if there are no figures, and the configuration cannot be reached.
    """
    check(config)
    settings, processor = _architecture(config)
    with torch.device("meta"):
        return _bare(settings, _dtype(config), config.attn_implementation), processor


def template(config, figures: bool | None = None) -> str | None:
    """The prompt format of an entry: the user's, or that of its figures where they stand in for the processor; None:
    the processor's own.

    Args:
        figures: whether the figures are used where no folder is named; None: with random weights.
    """
    if config.template is not None:
        return str(config.template).replace("\\n", "\n")  # the command line knows no escapes
    figures = config.weights == "random" and config.random is not None if figures is None else figures
    return config.random.template if figures and not local(config) else None


def _architecture(config):
    """The configuration and the processor of a folder, of an entry's figures, or of the hub."""
    if config.random is None or local(config):
        path, more = _path(config), dict(trust_remote_code=config.trust_remote_code)
        try:
            path = hub.source(path)
            settings, processor = AutoConfig.from_pretrained(path, **more), processors.load(path, **more)
        except (OSError, ValueError, ImportError) as error:
            raise _unreachable(config, error) from error
        processor.tokenizer.padding_side = "left"
        return settings, processor
    figures = OmegaConf.to_container(config.random)
    try:
        return AutoConfig.for_model(**figures["config"]), processors.synthetic(figures["processor"])
    except ImportError as error:
        raise _unreachable(config, error) from error
    except (ValueError, AttributeError, StrictDataclassError) as error:
        raise InputError(
            f"the figures of model.random do not fit: {shorten(str(error).strip().splitlines()[-1], 200)}"
        ) from error


def _bare(settings, dtype: torch.dtype, attn_implementation: str):
    """The architecture on the current device, its weights as transformers initialises them, its token ids those of the
    text model.
    """
    try:
        model = AutoModelForImageTextToText.from_config(
            settings, dtype=dtype, attn_implementation=attn_implementation
        ).eval()
    except (ValueError, ImportError) as error:
        raise InputError(f"could not build this architecture: {first_line(error)}") from error
    ids = {
        name: getattr(hf.text_config(model), name, None) for name in ("eos_token_id", "bos_token_id", "pad_token_id")
    }
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    model.generation_config.update(**ids)
    return model


def check(config) -> None:
    """Raise InputError for a model that cannot be used, and for values that are wrong on any machine."""
    if config.unsupported:
        raise InputError(f"{config.path}: {config.unsupported}")
    if not isinstance(config.prompt, str):
        raise InputError(f"model.prompt is a text, not {config.prompt!r}")
    if config.weights not in ("pretrained", "random"):
        raise InputError(choices(config.weights, ("pretrained", "random"), "model.weights"))
    _dtype(config)
    if config.quantization not in (None, "8bit", "4bit"):
        raise InputError(choices(config.quantization, ("8bit", "4bit", "null"), "model.quantization"))
    known = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "cuda")
    if isinstance(config.device_map, str) and config.device_map.split(":")[0] not in known:
        raise InputError(choices(config.device_map, known, "model.device_map"))
    given = [f"model.{name}" for name in ("device_map", "quantization", "adapter") if config[name]]
    if given and config.weights == "random":
        raise InputError(f"{' and '.join(given)} cannot be had with model.weights=random; leave them at null")


def _built(config) -> bool:
    """Whether a program of ours puts the model's folder together."""
    return bool(config.get("build")) and not config.path  # runs of before have no such key


def _path(config) -> str:
    if _built(config):
        return str(get_method(config.build)())
    if not config.path:
        raise InputError("model.path is missing; give a local folder or a hub id: model.path=FOLDER_OR_HUB_ID")
    path = str(Path(config.path).expanduser())
    if (ROOT / path).is_dir():
        return str(ROOT / path)
    if config.path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise InputError(f"model.path: there is no folder '{config.path}'; give a local folder or a hub id")
    return path


def local(config) -> bool:
    return bool(config.path) and Path(_path(config)).is_dir()


def _device(config) -> str:
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"no device '{name}' here ({first_line(error)}); model.device is auto, cpu, cuda, cuda:1, ..."
        ) from error
    return name


def _dtype(config) -> torch.dtype:
    if config.dtype not in DTYPES:
        raise InputError(choices(config.dtype, DTYPES, "model.dtype"))
    return getattr(torch, config.dtype)


def _quantized(config, dtype: torch.dtype) -> dict:
    if config.quantization is None:
        return {}
    if not is_bitsandbytes_available():
        raise InputError("model.quantization needs the package bitsandbytes: pip install bitsandbytes accelerate")
    eight = config.quantization == "8bit"
    return {
        "quantization_config": (
            BitsAndBytesConfig(load_in_8bit=True)
            if eight
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    }


def first_line(error: Exception) -> str:
    """What an error says first, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _unreachable(config, error: Exception) -> InputError:
    if isinstance(error, ImportError):
        return InputError(f"the model '{config.path}' needs a package that is not installed: {first_line(error)}")
    name = "NAME" if local(config) else config.path
    random = "; nor do random weights of this one, to try speed and memory: model.weights=random"
    return InputError(
        f"could not load the model '{config.path}': {first_line(error)}\nOffline: download it where there is a network"
        f" (hf download {name} --local-dir FOLDER), copy the folder here and give model.path=FOLDER.\nThe embedded"
        f" model needs no download: model=scenes{random if config.random else ''}."
    )
