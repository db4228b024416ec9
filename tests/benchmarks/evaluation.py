"""Seconds of each part of stage2/evaluate.py for some images, and what they come to at another number of images.

python tests/benchmarks/evaluation.py STAGE2_RUN [images=2000] [target=50000] [batch_size=256] [features=NAME]

Each part is timed once on its own. Its seconds grow with its work at the target, which the last column says: N images
are drawn and N held out, R training images are the reference, S stored versions are searched, and K images are kept.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqgen.cli.runs import run_images, writable_codes_folder
from vqgen.data.codes import encode_images
from vqgen.data.order import read_batches
from vqgen.evaluation.features import KEPT, FeatureCollector, load_feature_network, thumbnails
from vqgen.evaluation.likelihood import prior_nll
from vqgen.evaluation.metrics import frechet_distance, kernel_distance, manifold_figures, nearest, nearest_pixels
from vqgen.evaluation.report import evaluation_device
from vqgen.generator import Generator, Samples
from vqgen.settings import FEATURES, SampleConfig, Stage2EvaluateConfig
from vqgen.tokenizers.vqmodel import from_uint8, to_uint8
from vqgen.yaml_file import read_yaml


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long some work takes on the device, and its result."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


@torch.no_grad()
def main(run: str, images: int = 2000, target: int = 50_000, batch_size: int = 256, features: str = FEATURES) -> None:
    accelerator = evaluation_device()
    device, temporary = accelerator.device, tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    generator = Generator.from_pretrained(run).to(device)
    prior, tokenizer = generator.model, generator.tokenizer
    train, _, _ = run_images(Path(run), {}, generator.channels)
    shared = {"accelerator": accelerator}
    network = load_feature_network(features, None, train, seed=0, cache=folder, **shared)
    codes = encode_images(
        train, tokenizer, writable_codes_folder(Path(run), folder), tokenizer_hash=generator.tokenizer_hash,
        mirror=read_yaml(Path(run) / "config.yaml")["data"].get("flip", False), order=prior.layout.order, **shared,
    )  # fmt: skip
    batches = np.array_split(np.arange(images) % len(train), -(-images // batch_size))
    collector = FeatureCollector(images, (train.channels, *train.size), network)
    samples = Samples(generator, SampleConfig(num_images=images, batch_size=batch_size))
    places = np.array_split(np.arange(images), len(batches))
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        spent[name], result = seconds(work, device)
        return result

    def sampled() -> list[Any]:
        return [samples.__getitems__(part)[0] for part in places]

    def rebuilt(x: torch.Tensor) -> torch.Tensor:
        return to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(x))))

    def decoded() -> list[Any]:
        parts = (codes.__getitems__(np.arange(images)[part] % len(codes))[0].to(device) for part in places)
        return [thumbnails(to_uint8(tokenizer.decode(prior.layout.unflatten(tokens)))) for tokens in parts]

    samples.__getitems__(places[0][:1])  # warms up
    read = timed("reading", lambda: [x.to(device) for x, _ in read_batches(train, batches)])
    timed("reconstruction", lambda: [rebuilt(x) for x in read])
    class_ids = torch.zeros(images, dtype=torch.int64)
    timed("features", lambda: [collector.update(x, class_ids[p], p) for x, p in zip(read, places, strict=True)])
    drawn = timed("sampling", sampled)
    timed("NLL", lambda: prior_nll(prior, codes, images, batch_size, device))
    references = timed("search: decoding", decoded)
    queries = torch.cat([thumbnails(x) for x in drawn])
    timed("search: comparing", lambda: [nearest_pixels(queries, part) for part in references])
    found = collector.compute()
    half = found.some(max(2, len(found.kept) // 2))
    timed("Frechet and kernel distance", lambda: (frechet_distance(half, found), kernel_distance(half, found, 0)))
    timed("precision, recall, density, coverage", lambda: manifold_figures(found.kept, found.kept.flip(0)))
    timed("nearest by features", lambda: nearest(found.kept, found.kept))

    config, kept = Stage2EvaluateConfig(), min(images, KEPT)
    n, r, s, k = target, config.num_reference, config.search, min(target, KEPT)
    work = {  # the work at the target, the work that was timed, and in words
        "reading": (3 * n + 2 * r, images, "3 N + 2 R"),
        "reconstruction": (2 * n + r, images, "2 N + R"),
        "features": (3 * n + 2 * r, images, "3 N + 2 R"),
        "sampling": (n, images, "N"),
        "NLL": (2 * n, images, "2 N"),
        "search: decoding": (s, images, "S"),
        "search: comparing": (2 * k * s, kept * images, "2 K S"),
        "Frechet and kernel distance": (2, 1, "2, whatever N is"),
        "precision, recall, density, coverage": (2 * k * k, kept * kept, "2 K^2"),
        "nearest by features": (2 * k * min(r, KEPT), kept * kept, "2 K R"),
    }
    threads = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{run}: {train.size[0]} x {train.size[1]} x {train.channels} pixels, {network.name}, {threads}")
    print(f"N = {n:,}, R = {r:,}, S = {s:,}, K = {k:,}; reading is {'of memory' if train.in_memory else 'of files'}")
    print(f"{'':<38}{f'{images:,} images':>16}{f'{n:,} images':>16}   grows with")
    later = {name: spent[name] * at / of for name, (at, of, _) in work.items()}
    for name, (_, _, words) in work.items():
        print(f"{name:<38}{spent[name]:>14.2f} s{later[name]:>14.1f} s   {words}")
    print(f"{'all':<38}{'':>16}{sum(later.values()):>14.1f} s")


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[2:])
    main(sys.argv[1], **{key: value if key == "features" else int(value) for key, value in given.items()})
