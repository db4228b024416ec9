"""The exception for mistakes that the user can correct, and the checks that raise it. Imports nothing else of vqgen."""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any


class InputError(ValueError):
    """The user's input (a key, a value, a path, an image) cannot be used.

    The message is one line that says what is wrong and what to do. The programs print only this line and exit with
    code 2. Any other exception is a bug and keeps its traceback.

    The library's messages begin with the option at fault, under its name in the constructor, as in `codebook_size=500:
    lfq needs a power of two; use 256 or 512`. Callers add the option's section: see `section`.

    Args:
        message: the line.
        near: the option that the user probably meant; the line then ends with it.
    """

    def __init__(self, message: str, near: str | None = None):
        super().__init__(f"{message}; did you mean {near}?" if near else message)
        self.message, self.near = message, near


@contextmanager
def section(name: str, /, **elsewhere: str) -> Iterator[None]:
    """Adds `name.` in front of each option in the message of an InputError that is raised inside.

    An option is the word at the message's beginning (`key=`, `key:` or `key.`), or a word in a remedy: `set key`, `give
    key` or `raise key`, followed by `=`, `;`, `,` or the end.

    Args:
        name: the options' section, as in `model.quantizer`.
        elsewhere: the full keys of options outside this section, as in `image_size="data.image_size"`.
    """

    def full(key: str) -> str:
        return elsewhere.get(key, f"{name}.{key}")

    try:
        yield
    except InputError as error:
        message = re.sub(r"\A\w+(?=[=:.])", lambda option: full(option[0]), error.message)
        remedy = r"\b(set|give|raise) (?!that\b|others\b)([a-z]\w*)((?:\.\w+)*)(?=[=;,]|$)"
        message = re.sub(remedy, lambda part: f"{part[1]} {full(part[2])}{part[3]}", message)
        raise InputError(message, error.near and full(error.near)) from error.__cause__


def require(condition: bool, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_size(key: str, value: int, most: int = 2**63, least: int = 1) -> None:
    """Raises InputError unless the value is a whole number from `least` to `most`."""
    require(isinstance(value, Integral), f"{key}={value}: must be a whole number")
    require(value >= least, f"{key}={value}: must be at least {least}")
    require(value <= most, f"{key}={value}: must be at most {most}")


def require_choice(key: str, value: Any, choices: Collection[str], what: str) -> None:
    """Raises InputError for a value that is not among the choices; `what` is the word for a choice."""
    require(value in list(choices), f"{key}={value}: no such {what}; there is {', '.join(choices)}")


def require_options(constructor: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Raises InputError for an option that a constructor does not take, with the reason or the nearest option.

    Args:
        constructor: the constructor. Its attribute `refused`, if it has one, gives reasons by option.
        name: the constructor's name in the message.
        options: the keyword arguments for the constructor.
    """
    known = list(inspect.signature(constructor).parameters)
    reasons: Mapping[str, str] = getattr(constructor, "refused", {})
    for key, value in options.items():
        if key in reasons:
            raise InputError(f"{key}={value}: {name} has no such option: {reasons[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            takes = "" if near else f"; it takes {', '.join(known)}"
            raise InputError(f"{key}: {name} has no such option{takes}", *near)


def need(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Args:
        module: the module's name, as in an import statement.
        extra: the extra of vqgen that installs the package.
        what: the program, setting or function that needs the package, for the message.

    Raises:
        InputError: the package is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is installed, but one of its dependencies is missing
            raise
        raise InputError(f"{what} needs {package}, which is not installed; pip install 'vqgen[{extra}]'") from error


def expanded(folder: str | Path) -> Path:
    """A folder as a Path, with `~` replaced by the home directory.

    Raises:
        InputError: the path names a user who does not exist.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise InputError(f"{folder}: {error}") from error
