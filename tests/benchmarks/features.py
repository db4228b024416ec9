"""Speed of the feature networks in images per second: medians over rounds in which they take turns.

python tests/benchmarks/features.py [images=256] [rounds=5]
"""

import statistics
import sys
import time

import torch
from efficientnet_lite_pytorch import EfficientNet

from vqgen.evaluation.features import EfficientNetLite0, FeatureCollector, LeNet
from vqgen.evaluation.inception import InceptionV3


def main(images: int = 256, rounds: int = 5) -> None:
    ours, lenet, inception = EfficientNetLite0(), LeNet(3, 10), InceptionV3()
    for network in (lenet, inception):
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    package = EfficientNet.from_name("efficientnet-lite0").eval()
    small = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    large = torch.randn(images, 3, 96, 96)
    collector = FeatureCollector(images, (3, 32, 32), ours)
    rows = torch.arange(images)

    def collect(batch_size: int) -> None:
        for batch in rows.split(batch_size):
            collector.update(small[batch], batch, batch.numpy())

    few = max(1, images // 16)
    ways = {
        "EffLite0, package, one at a time": (few, lambda: [package.extract_features(x[None]) for x in large[:few]]),
        "EffLite0, package, batches of 64": (images, lambda: [package.extract_features(x) for x in large.split(64)]),
        "EffLite0, ours, resize and sums, of 64": (images, lambda: collect(64)),
        "EffLite0, ours, resize and sums, of 256": (images, lambda: collect(256)),
        "LeNet, of 64": (images, lambda: [lenet(x) for x in small.split(64)]),
        "Inception, of 16": (few, lambda: [inception(x) for x in small[:few].split(16)]),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first round warms up
            for name, (count, run) in ways.items():
                start = time.perf_counter()
                run()
                speeds[name].append(count / (time.perf_counter() - start))
    first = statistics.median(speeds[next(iter(ways))][1:])
    print(f"{'':<44}images/s   ratio")
    for name, values in speeds.items():
        median = statistics.median(values[1:])
        print(f"{name:<44}{median:8.0f}{median / first:8.1f}")


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
