"""Plain functions for the process group, which also work without one."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vqgen.errors import InputError

T = TypeVar("T")
_kept: list[Any] = []  # the process group's object


def keep_group() -> None:
    """Keeps the object of the process group, if there is one, until `free_group`.

    The last owner's end waits for Gloo's threads. DDP would wait with Python's lock held, which such a thread may need
    to free a tensor, so both would wait for ever (pytorch issue 56297). The object itself waits without the lock.
    """
    if dist.is_initialized():
        _kept.append(dist.group.WORLD)


def free_group() -> None:
    """Frees what `keep_group` kept; call it when no DDP is left."""
    _kept.clear()


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sums x over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def reduce_to_main(x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum of x over the processes, or another reduction, on the main process; on the others x is worthless then."""
    if world_size() > 1:
        dist.reduce(x, dst=0, op=op)
    return x


def gathered_by_main(value: T) -> list[T]:
    """The values of all processes in their order, on the main process; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_gather(x: Tensor) -> Tensor:
    """The x of every process, (world_size, *x.shape)."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def from_main(value: float, device: torch.device) -> float:
    """The main process's value, on all processes; they must agree on a clock's time before it decides anything."""
    if world_size() > 1:
        shared = torch.tensor(value, dtype=torch.float32, device=device)
        dist.broadcast(shared, src=0)
        return shared.item()
    return value


def object_from_main(value: Any) -> Any:
    """The main process's object, on all processes, even if they share no disk."""
    if world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    return value


def computed_by_main(compute: Callable[[], T]) -> T:
    """The result of compute() on the main process, on all processes. All processes must call it.

    Raises:
        Exception: compute() raised it on the main process. Others than InputError and OSError, which may not be sent,
            are RuntimeErrors on the other processes.
    """
    if world_size() == 1:
        return compute()
    value = error = None
    if rank() == 0:
        try:
            value = compute()
        except (InputError, OSError) as raised:  # sent on, because the other processes wait for a value
            error = raised
        except Exception as raised:
            object_from_main((None, RuntimeError(f"the main process failed: {raised}")))
            raise
    value, error = object_from_main((value, error))
    if error is not None:
        raise error
    return value


def all_agree(value: bool) -> bool:
    """Whether the value is true on all processes. All processes must call it."""
    if world_size() == 1:
        return value
    votes: list[Any] = [None] * world_size()
    dist.all_gather_object(votes, value)
    return all(votes)


def available_cores() -> list[int]:
    """The numbers of this machine's cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores_per_process() -> int:
    """This machine's cores that this process may use, divided by the processes on this machine; at least 1.

    A launcher sets LOCAL_WORLD_SIZE to the number of processes on this machine; otherwise all count as on this machine.
    """
    return max(1, len(available_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))
