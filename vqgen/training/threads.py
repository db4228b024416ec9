"""The number of CPU threads of a run: another number sums in another order, which changes the last bits."""

import os

import torch

CHOSEN = "VQGEN_CHOSE_THREADS"  # this environment variable is set if the program chose the number, not the user


def keep_threads(saved: int | None) -> str:
    """Sets the number of threads that the checkpoint was made with, unless the user chose the number now.

    Args:
        saved: the checkpoint's number of threads; None if an older version wrote the checkpoint.

    Returns:
        The end of a line that tells the user about a change; empty if there is none.
    """
    now = torch.get_num_threads()
    if saved is None or saved == now:
        return ""
    if os.environ.get(CHOSEN):
        torch.set_num_threads(saved)
        return f" with {saved} thread(s), as before"
    return f" with {now} thread(s) after {saved}: the same numbers but for rounding"
