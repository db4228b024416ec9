"""Published weights of other projects: finds them in a package, checks them, and reads them without running code."""

import hashlib
import logging
import pickle
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from vqgen.errors import InputError

logger = logging.getLogger("vqgen")


def installed_file(package: str, file: str, remedy: str) -> Path:
    """The path of a file in an installed package; does not import the package.

    Raises:
        InputError: the package is not installed; the message ends with `remedy`.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the weights are in the package {package.replace('_', '-')}, which is missing; {remedy}")
    return Path(spec.submodule_search_locations[0]) / file


def fetched_file(url: str, expected: str, what: str, remedy: str) -> Path:
    """The path of a published file in torch.hub's folder, into which it is fetched once.

    Args:
        url: the file's address.
        expected: the beginning of the correct SHA-256.
        what: the setting that needs the file, for the message.
        remedy: another way to give the file, for the end of the message.

    Raises:
        InputError: it cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        logger.warning(f"{what}: fetching {url}, once, to {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), expected)
        except (URLError, OSError, RuntimeError) as error:
            elsewhere = f"fetch it elsewhere and put it into {path.parent}"
            raise InputError(f"{what}: {url} cannot be downloaded ({error}); {elsewhere}, {remedy}") from error
    return path


def read_weights(path: Path, expected: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pth file by name, on the CPU, and the file's SHA-256.

    Args:
        path: the file.
        expected: the beginning of the correct SHA-256; None accepts any file.

    Raises:
        InputError: there is no such file, its checksum differs, or it does not hold tensors by name.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights; fetch it, or give the path of another")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is not None and not checksum.startswith(expected):
        raise InputError(
            f"{path} is damaged or another file: its SHA-256 is {checksum}, not {expected}; fetch it again"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path} does not load as weights: {reason}") from error
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no weights by name; give a saved state_dict")
    return state, checksum
