"""The one exception for what a user can put right."""


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
