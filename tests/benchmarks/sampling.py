"""How fast token sequences are drawn: sample_tokens, transformers' generate, and the multiplications alone.

python tests/benchmarks/sampling.py [--shapes 64,8 64,64 256,32 1024,4] [--rounds 3] [--guided]
    [--precision no|bf16] [--cuda-graph] [--model-type llama]

Prints a table with a row for each shape, of tokens and sequences at a time, of an untrained prior of width 256 with 6
layers and 512 codes. All take turns in one process; the times are medians of the rounds, in ms a token. "Products" is
the time of the weights' products with as many columns, without attention: no sampler with a cache can be faster. With
--guided ours is guided at each token, and generate is not. On a GPU, times include the wait for the last token.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable

import torch

from vqgen.codes import CodeLayout
from vqgen.priors.decoder import PLAIN, LlamaDecoder, product
from vqgen.priors.prior import Prior
from vqgen.priors.sampling import sample_tokens

WIDTH, LAYERS, HEADS, CODES, CLASSES = 256, 6, 4, 512, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def untrained(tokens: int, model_type: str = "llama") -> Prior:
    """A prior for a grid of so many tokens."""
    height = math.isqrt(tokens)
    layout = CodeLayout(((1, height, tokens // height),), (CODES,))
    names = [str(i) for i in range(CLASSES)]
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    window = {"sliding_window": None} if model_type == "mistral" else {}
    return Prior(layout, names, model_type, **sizes, **window).eval().to(DEVICE)


def ways(prior: Prior, batch: int, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed, by the headings of the table."""
    class_ids = torch.arange(batch, device=DEVICE) % CLASSES
    length = prior.layout.num_tokens
    columns = batch * (1 + options.guided)
    bf16 = options.precision == "bf16"
    weights = [
        part.to(torch.bfloat16 if bf16 else torch.float32)
        for layer in LlamaDecoder(prior.lm, 1, 1).layers
        for part in (layer.qkv, layer.out, layer.gate_up, layer.down)
    ]
    inputs = [torch.randn(columns, weight.shape[1], device=DEVICE, dtype=weight.dtype).t() for weight in weights]

    lm = copy.deepcopy(prior.lm).to(weights[0].dtype)

    def ours() -> None:
        scale = 2.0 if options.guided else 1.0
        sample_tokens(prior, class_ids, cfg_scale=scale, precision=options.precision, cuda_graph=options.cuda_graph)

    def generate(**cache: str) -> None:
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0}
        lm.generate(prior.class_tokens(class_ids), **settings, **cache)

    def products() -> None:
        for _ in range(length):
            for weight, x in zip(weights, inputs, strict=True):
                product(weight, x)

    return {
        "ours": ours,
        "generate": generate,
        "generate, static cache": lambda: generate(cache_implementation="static"),
        "products": products,
    }


@torch.no_grad()
def measure(tokens: int, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each way, the median of the rounds after one that is not counted."""
    torch.manual_seed(0)
    each = ways(untrained(tokens, options.model_type), batch, options)
    times: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(options.rounds + 1):
        for name, way in each.items():
            start = time.perf_counter()
            way()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def main(options: argparse.Namespace) -> None:
    headings = ["ours", "generate", "generate, static cache", "products"]
    print(f"| tokens, sequences | {', ms a token | '.join(headings)}, ms a token | ours, images/s | times generate |")
    print("|---" * (len(headings) + 3) + "|")
    for tokens, batch in options.shapes:
        found = measure(tokens, batch, options)
        cells = [f"{1000 * found[name] / tokens:.2f}" for name in headings]
        ratio = found["generate"] / found["ours"]
        print(f"| {tokens}, {batch} | {' | '.join(cells)} | {batch / found['ours']:.1f} | {ratio:.2f} |", flush=True)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(64, 8), (64, 64), (256, 32), (1024, 4)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--model-type", choices=PLAIN, default="llama")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parsed())
