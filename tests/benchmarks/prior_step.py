"""How near stage 2's training step comes to the machine's rate of multiplication.

python tests/benchmarks/prior_step.py [--shapes 128,4,16,64 512,6,64,64] [--rounds 5] [--threads N]

Prints a table with a row for each shape: width, layers, tokens, sequences at a time. The pass is forward and backward;
an update is what stage 2 does after it: clipping, AdamW's or Muon's step, and the average of the weights. "Rate" is
that of all matrix products, which torch's FLOP counter counts, Muon's own included, as a share of the rate of a product
of two matrices of 2048 x 2048. All take turns in one process; times are medians of the rounds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vqgen.codes import CodeLayout
from vqgen.priors.prior import Prior
from vqgen.training.average import WeightEMA
from vqgen.training.muon import Muon, muon_groups
from vqgen.training.schedule import parameter_groups

CODES, CLASSES, SQUARE = 512, 10, 2048


class Step:
    """A prior with the parts that train it.

    Args:
        shape: width, layers, tokens, sequences.
        muon: Muon instead of AdamW.
    """

    def __init__(self, shape: tuple[int, ...], muon: bool):
        width, layers, tokens, batch = shape
        torch.manual_seed(0)
        side = math.isqrt(tokens)
        layout = CodeLayout(((1, side, tokens // side),), (CODES,))
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": max(1, width // 64)}
        self.prior = Prior(layout, [str(i) for i in range(CLASSES)], **sizes).train()
        groups, options = parameter_groups(self.prior, 0.05), {"lr": 1e-3, "betas": (0.9, 0.95), "fused": True}
        if muon:
            self.optimizer = Muon(muon_groups(groups, self.prior.tables_and_scales), **options)
        else:
            self.optimizer = torch.optim.AdamW(groups, **options)
        self.average = WeightEMA(self.prior, 0.999)
        self.tokens, self.class_ids = torch.randint(CODES, (batch, tokens)), torch.arange(batch) % CLASSES

    def backward(self) -> None:
        logits = self.prior(self.tokens, self.class_ids)
        F.cross_entropy(logits.flatten(0, 1), self.tokens.flatten()).backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.prior.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.prior, 10)


def operations(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products, two for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(shape: tuple[int, ...], rounds: int) -> str:
    """A line of the table."""
    adamw, muon = Step(shape, muon=False), Step(shape, muon=True)
    square = torch.randn(SQUARE, SQUARE)
    works = {
        "pass": adamw.backward, "AdamW": adamw.update, "again": muon.backward, "Muon": muon.update,
        "product": lambda: square @ square,
    }  # fmt: skip
    flops = {name: operations(work) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    rate = flops["product"] / seconds["product"]
    share = lambda *names: sum(flops[n] for n in names) / sum(seconds[n] for n in names) / rate  # noqa: E731
    cells = [", ".join(map(str, shape)), *(f"{1000 * seconds[name]:.0f}" for name in ("pass", "AdamW", "Muon"))]
    cells += [f"{share('pass'):.0%}", f"{share('pass', 'AdamW'):.0%}", f"{share('pass', 'Muon'):.0%}"]
    return f"| {' | '.join([*cells, f'{rate / 1e9:.0f}'])} |"


def main(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    headings = ["width, layers, tokens, sequences", "pass, ms", "AdamW, ms", "Muon, ms", "rate of the pass"]
    headings += ["with AdamW", "with Muon", "product, GFLOP/s"]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for shape in options.shapes:
        print(row(shape, options.rounds), flush=True)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=[(128, 4, 16, 64), (256, 6, 64, 32), (512, 6, 64, 64)]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parsed())
