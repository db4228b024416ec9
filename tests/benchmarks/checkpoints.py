"""Checkpoints of a large prior: how long training waits, when they are on the disk, and what reading them takes.

python tests/benchmarks/checkpoints.py [folder=runs/checkpoints] [width=768] [layers=12]
torchrun --nproc_per_node 2 tests/benchmarks/checkpoints.py ...
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from vqgen.codes import CodeLayout
from vqgen.distributed import rank, world_size
from vqgen.priors.prior import Prior
from vqgen.training.average import WeightEMA
from vqgen.training.checkpoints import damage, load_state, newest_checkpoint, save_checkpoint, with_tensors
from vqgen.training.shards import BackgroundWriter
from vqgen.training.state import TrainState

CODES, TOKENS = 16384, 256


def made(width: int, layers: int) -> TrainState:
    """A prior, its average and AdamW's state after a step."""
    torch.manual_seed(0)
    layout = CodeLayout(((1, 16, 16),), (CODES,))
    prior = Prior(layout, [], hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    optimizer = torch.optim.AdamW(prior.parameters(), fused=True)
    for p in prior.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(model=prior, ema=WeightEMA(prior, 0.05), optimizer=optimizer)


def peak() -> float:
    """The largest memory of this process since `reset_peak`, in GB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e9


def reset_peak() -> None:
    """Makes Linux forget the largest memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(folder: Path, state: TrainState, in_shards: bool) -> list[float]:
    """Seconds that training waits, and until the checkpoint is whole; GB more; seconds and GB more of resuming."""
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    Accelerator().wait_for_everyone()
    writer = BackgroundWriter() if in_shards else None
    reset_peak()
    before, start = peak(), time.perf_counter()
    if in_shards or rank() == 0:
        save_checkpoint(folder, 1, {"step": 1, **state.state_dict()}, 1, writer=writer)
    if not in_shards:
        Accelerator().wait_for_everyone()  # as training does at its next step
    waited = time.perf_counter() - start
    if writer is not None:
        writer.close()
    whole, saving = time.perf_counter() - start, peak() - before
    reset_peak()
    before, start = peak(), time.perf_counter()
    newest = newest_checkpoint(folder)
    checked = time.perf_counter() - start
    saved = load_state(newest, mmap=False)
    state.load_state_dict(with_tensors(newest, saved, state.places(saved)))
    assert damage(newest) is None
    return [waited, whole, saving, checked, time.perf_counter() - start - checked, peak() - before]


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    Accelerator(cpu=True)
    folder = Path(given.get("folder", "runs/checkpoints"))
    state = made(int(given.get("width", 768)), int(given.get("layers", 12)))
    numbers = sum(p.numel() for p in state.parts["model"].parameters())
    rows: dict[str, list[list[float]]] = {"shards": [], "one file": []}
    for _ in range(3):
        for name, times in rows.items():
            times.append(measured(folder, state, name == "shards"))
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{numbers / 1e6:.0f} M parameters, {world_size()} process(es), medians of 3 times, and the most memory")
        print(f"{'':10}{'waits s':>10}{'whole s':>10}{'GB more':>10}{'check s':>10}{'read s':>10}{'GB more':>10}")
        for name, times in rows.items():
            # Memory that was freed stays with the process, and is not counted when it is used again.
            middle, most = torch.tensor(times).median(dim=0).values, torch.tensor(times).amax(dim=0)
            shown = [most[i] if i in (2, 5) else middle[i] for i in range(6)]
            print(f"{name:10}" + "".join(f"{x:10.2f}" for x in shown))


if __name__ == "__main__":
    main()
