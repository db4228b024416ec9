"""The exception for what a user can put right, and the checks that raise it. Imports nothing else of vqgen."""

import importlib
from pathlib import Path
from types import ModuleType


class InputError(ValueError):
    """What the user gave (a key, a value, a path, an image) cannot be used.

    The message is one line that says what is wrong and what to do; the programs print it alone and exit with code 2.
    Any other exception is a bug, and keeps its traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raises InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_size(key: str, value: int, most: int = 2**63, least: int = 1) -> None:
    """Raises InputError for a whole number that is too small, or so large that it can only be a mistake."""
    require(value >= least, f"{key}={value}: must be at least {least}")
    require(value <= most, f"{key}={value}: must be at most {most}")


def need(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Args:
        module: its name, as in an import statement.
        extra: the extra of vqgen that installs it.
        what: the program, setting or function that needs it, for the message.

    Raises:
        InputError: the package is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there, and something else is missing
            raise
        raise InputError(f"{what} needs {package}, which is not installed; pip install 'vqgen[{extra}]'") from error


def expanded(folder: str | Path) -> Path:
    """A folder as a Path, with `~` replaced by the home directory.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise InputError(f"{folder}: {error}") from error
