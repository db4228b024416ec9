"""A run's CPU: whether it computes in bf16, and its number of threads, on which the last bits of sums depend."""

import os
from typing import Any

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
    return f" with {now} thread(s) after {saved}: the same numbers except for rounding"


def computes_bf16(device: torch.device) -> bool:
    """Whether the device is an x86 CPU with instructions for bf16; torch emulates bf16 on others, which is slow."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
