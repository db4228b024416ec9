"""The one exception for what a user can put right."""


class InputError(ValueError):
    """What the user gave (a key, a value, a path, an image) cannot be used.

    The message is one line that says what is wrong and what to do; the programs print it alone and exit with code 2.
    Any other exception is a bug, and keeps its traceback.
    """
