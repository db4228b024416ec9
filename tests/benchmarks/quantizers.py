"""Speed and memory of the quantizers, beside vector-quantize-pytorch and the bare matrix multiply.

python tests/benchmarks/quantizers.py [ROUNDS]

Each row is a forward and a backward pass in training mode on the same maps; the competitors take turns in one process.
Times are medians over ROUNDS rounds, 9 by default. It runs on a GPU if there is one.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from vqgen.quantizers import Quantizer, build_quantizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(16384, 64, 512), (8192, 256, 1024), (8192, 8, 8192), (4096, 256, 16384)]  # N, D, K
MEMORY_SHAPE = (65536, 32, 16384)
SETTINGS = {"decay": 0.99, "commitment_weight": 0.25}
THEIRS = {
    "ema": {"threshold_ema_dead_code": 1},
    "vq": {"threshold_ema_dead_code": 0, "ema_update": False, "learnable_codebook": True},
}


def maps(num_vectors: int, dim: int) -> Tensor:
    """Random maps (B, D, 16, 16) with this number of vectors."""
    torch.manual_seed(0)
    return torch.randn(num_vectors // 256, dim, 16, 16, device=DEVICE, requires_grad=True)


def train_step(quantizer: torch.nn.Module, z: Tensor, gradient: Tensor) -> None:
    """A forward and a backward pass; our and their quantizers both return the vectors first and the loss last."""
    z.grad = None
    quantizer.zero_grad()
    z_q, _, loss = quantizer(z)
    torch.autograd.backward([z_q, loss.sum()], [gradient, torch.ones_like(loss.sum())])


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each function; the functions take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first call initialises the codebook
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def speed(rounds: int) -> None:
    print("quantizer      N    D      K       ours     theirs    z @ C.T   theirs / ours   ours / matmul")
    for name, theirs in THEIRS.items():
        for num_vectors, dim, size in SHAPES:
            z = maps(num_vectors, dim)
            gradient = torch.randn_like(z)
            ours = build_quantizer(name=name, codebook_size=size, code_dim=dim, **SETTINGS).to(DEVICE).train()
            other = VectorQuantize(
                dim, codebook_size=size, accept_image_fmap=True, rotation_trick=False, **SETTINGS, **theirs
            )
            other = other.to(DEVICE).train()
            flat = rearrange(z.detach(), "b d h w -> (b h w) d").contiguous()
            codebook = torch.randn(size, dim, device=DEVICE)
            times = interleaved(
                {
                    "ours": lambda: train_step(ours, z, gradient),  # noqa: B023
                    "theirs": lambda: train_step(other, z, gradient),  # noqa: B023
                    "matmul": lambda: flat @ codebook.T,  # noqa: B023
                },
                rounds,
            )
            row = "".join(f"{value:>8.1f} ms" for value in times.values())
            ratios = f"{times['theirs'] / times['ours']:>15.1f}x {times['ours'] / times['matmul']:>14.2f}x"
            print(f"{name:>9} {num_vectors:>6} {dim:>4} {size:>6}{row}{ratios}", flush=True)


def resident_set() -> dict[str, int]:
    """Bytes of this process in memory: now (VmRSS) and at the peak (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[key].split()[0]) * 2**10 for key in ("VmRSS", "VmHWM")}


def peak_memory(quantizer: Quantizer, z: Tensor) -> float:
    """MB that a training step needs at its peak, beyond the memory before it and its outputs."""
    gradient = torch.randn_like(z)
    outputs = 2 * z.nbytes + 8 * len(z) * 256 + sum(p.nbytes for p in quantizer.parameters())  # z_q, codes, gradients
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(quantizer, z, gradient)
        return (torch.cuda.max_memory_allocated() - before - outputs) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # Linux: returns free memory to the system, so that new use of it is counted
    before = resident_set()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    train_step(quantizer, z, gradient)
    return (resident_set()["VmHWM"] - before - outputs) / 2**20


def memory() -> None:
    num_vectors, dim, size = MEMORY_SHAPE
    for name in THEIRS:
        quantizer = build_quantizer(name=name, codebook_size=size, code_dim=dim).to(DEVICE).train()
        train_step(quantizer, maps(256, dim), torch.zeros_like(maps(256, dim)))  # initialises
        peak = peak_memory(quantizer, maps(num_vectors, dim))
        print(f"{name:>9} {num_vectors:>6} {dim:>4} {size:>6} {peak:>6.0f} MB beyond inputs and outputs")


if __name__ == "__main__":
    memory()
    speed(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
