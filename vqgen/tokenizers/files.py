"""Other projects' files of weights: found, unpacked, and read without running code."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqgen.errors import InputError, require

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
WRAPPERS = ("module.", "_orig_mod.", "first_stage_model.")  # of DDP, torch.compile, and of a whole generator
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in diffusers' first files

Weights = dict[str, Tensor]


def unwrapped(weights: Weights, notes: list[str]) -> Weights:
    """The weights without the prefixes of what they were wrapped in; a line of the notes says what lay beside them."""
    while True:
        prefix = next((p for p in WRAPPERS if any(name.startswith(p) for name in weights)), None)
        if prefix is None:
            return weights
        others = {name.partition(".")[0] + ".*" for name in weights if not name.startswith(prefix)}
        if others:
            notes.append(f"left out: {', '.join(sorted(others))}, which lie beside {prefix}*")
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def read_file(path: Path) -> tuple[Weights, dict[str, Any], list[str]]:
    """The weights and the settings in a file of taming-transformers or LlamaGen, and a line that says what was taken.

    Raises:
        InputError: there is no such file, or it does not hold weights by name.
    """
    if path.is_dir():
        folder = any((path / name).is_file() for name in DIFFUSERS_FILES)
        remedy = "use --from diffusers" if folder else "give the file of weights in it"
        raise InputError(f"{path} is a folder, not a file; {remedy}")
    content = _loaded(path)
    inside = next((name for name in ("ema", "model", "state_dict") if isinstance(content.get(name), dict)), None)
    args = content.get("args")
    settings = vars(args) if isinstance(args, argparse.Namespace) else {}
    if inside is None:
        return _named(path, content), settings, []
    others = ", ".join(sorted(str(name) for name in content if name != inside))
    return _named(path, content[inside]), settings, [f"taken: {inside}" + (f"; left out: {others}" if others else "")]


def read_folder(path: Path) -> tuple[Weights, dict[str, Any], list[str]]:
    """The weights and the settings in a folder of diffusers' VQModel, by the names that diffusers has now.

    Raises:
        InputError: there is no such folder, or it holds another model, or one that VQGAN cannot be.
    """
    require(path.exists(), f"{path}: no such folder")
    require(path.is_dir(), f"{path} is a file, but diffusers' models are folders; give the folder with its config.json")
    part = next((name for name in ("vqvae", "movq", "vae") if (path / name / "config.json").is_file()), None)
    inside = f"; give the part {path / part}" if part else ""
    require((path / "config.json").is_file(), f"{path} has no config.json, so it is not a model of diffusers{inside}")
    file = next((path / name for name in DIFFUSERS_FILES if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} has neither {' nor '.join(DIFFUSERS_FILES)}; fetch one of them")
    try:
        settings = dict(json.loads((path / "config.json").read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / 'config.json'} is not diffusers': {error}") from error
    kind = settings.get("_class_name")
    require(kind == "VQModel", f"{path} is diffusers' {kind}, not its VQModel")
    norm, activation = settings.get("norm_type", "group"), settings.get("act_fn", "silu")
    spatial = "its decoder's normalisations depend on codes (MoVQ), and vqgan has no such layers"
    require(norm == "group", f"{path} has norm_type={norm}: {spatial}")
    require(activation in ("silu", "swish"), f"{path} has act_fn={activation}; vqgan has only silu")

    def renamed(name: str) -> str:
        old = re.fullmatch(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)", name)
        return f"{old[1]}{OLD_ATTENTION[old[2]]}{old[3]}" if old else name

    settings.setdefault("norm_num_groups", 32)
    return {renamed(name): value for name, value in _named(file, _loaded(file)).items()}, settings, []


def _loaded(path: Path) -> dict[str, Any]:
    """What is in a file of weights; runs no code.

    Raises:
        InputError: there is no such file, it does not load, or it holds more than plain data.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # LlamaGen's settings are a Namespace. What torch warns of here, it also raises as an error.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            save = f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'weights.pt')"
            raise InputError(
                f"{path} also holds {found[1]}, which could run code and is not loaded; if you trust the file, save "
                f'its weights alone where that is installed: python -c "import torch; {save}"'
            ) from error
        raise _damaged(path, str(error).rpartition("WeightsUnpickler error: ")[2]) from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise _damaged(path, str(error)) from error
    require(isinstance(content, dict), f"{path} holds no weights by name, but a {type(content).__name__}")
    return content


def _damaged(path: Path, reason: str) -> InputError:
    first = (reason.splitlines() or [""])[0][:100]
    why = f" ({first})" if first else ""
    return InputError(f"{path} does not load: it is damaged, or no file of weights{why}; fetch it again")


def _named(path: Path, content: Mapping[Any, Any]) -> Weights:
    """The content, if it is weights by name."""
    fine = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    require(fine and len(content) > 0, f"{path} holds no weights by name; give a saved state_dict")
    return dict(content)
