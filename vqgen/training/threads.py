"""The number of threads that a run computes with on a CPU: sums in another order give other bits."""

import os

import torch

CHOSEN = "VQGEN_CHOSE_THREADS"  # is set in the environment if the program, and not the user, chose the number


def keep_threads(saved: int | None) -> str:
    """Goes on with as many threads as a checkpoint was made with, unless the user chose the number now.

    Args:
        saved: the checkpoint's number; None if its version did not note it.

    Returns:
        What the user should know, for the end of a line; mostly nothing.
    """
    now = torch.get_num_threads()
    if saved is None or saved == now:
        return ""
    if os.environ.get(CHOSEN):
        torch.set_num_threads(saved)
        return f" with {saved} thread(s), as before"
    return f" with {now} thread(s) after {saved}: the same numbers but for rounding"
