"""How near a plan's predictions come: seconds of a step and memory, predicted and measured by the programs themselves.

python tests/benchmarks/plan.py [--steps 100] [--runs FOLDER] [--only NAME ...]

Prints a row for each configuration. "Predicted" is what stage1/plan.py says for this machine. "Measured" is the mean
over the last half of the steps of the program itself, and the largest resident memory of its process.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vqgen.data.images import load_images
from vqgen.planning.choose import SLACK, Images, Machine, Setting
from vqgen.settings import DataConfig, PlanConfig
from vqgen.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
LARGER = ["model.hidden_size=256", "model.num_hidden_layers=8", "model.num_attention_heads=8", "optim.lr=3e-3"]
CASES: dict[str, tuple[int, str, list[str]]] = {  # name: stage, data set, changes
    "stage 1, digits": (1, "digits", []),
    "stage 1, cifar10": (1, "cifar10", []),
    "stage 1, emoji64": (1, "emoji64", []),
    "stage 1, emoji64, batches of 256": (1, "emoji64", ["train.batch_size=256"]),
    "stage 2, digits": (2, "digits", []),
    "stage 2, emoji64": (2, "emoji64", []),
    "stage 2, emoji64, width 256": (2, "emoji64", LARGER),
}


def plan_program() -> Any:
    spec = importlib.util.spec_from_file_location("plan_program", ROOT / "stage1/plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(stage: int, data: str, changes: list[str]) -> list[Setting]:
    """The settings of a configuration, in the form of a plan's."""
    path = ROOT / f"configs/stage{stage}/{data}.yaml"
    tree: dict[str, Any] = read_yaml(path) if path.is_file() else {}
    found = [
        Setting(f"{section}.{key}", value)
        for section, values in tree.items()
        if isinstance(values, dict) and section != "tracking"
        for key, value in values.items()
    ]
    found += [Setting(key, value) for key, value in tree.items() if key == "context_noise"]
    given = dict(change.split("=") for change in changes)
    return [s for s in found if s.key not in given] + [Setting(k, json.loads(v)) for k, v in given.items()]


def predicted(case: tuple[int, str, list[str]]) -> tuple[float, float]:
    """Seconds of a step, and bytes."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    stage, data, changes = case
    program = plan_program()
    first, own = settings_of(1, data, []), settings_of(stage, data, changes)
    data_settings = {s.key.removeprefix("data."): s.value for s in first if s.key.startswith("data.")}
    config = PlanConfig(data=DataConfig(**data_settings))
    train_set, _ = load_images(dataclasses.replace(config.data, cache_gb=0))
    images = Images(len(train_set), train_set.channels, 0, config.data.flip)
    if "image_size" not in data_settings:
        first = [*first, Setting("data.image_size", config.data.image_size)]
    planned = program.Planned(images, Machine(1, 0, 0, True, "no", ""), config.data, train_set)
    if stage == 1:
        own = [*(s for s in first if s.key not in {s.key for s in own}), *own]
        cost, speed = planned.tokenizer_cost(own), planned.tokenizer_speed(own, 1)
    else:
        cost, speed = planned.prior_cost(own, first), planned.prior_speed(own, first, 1)
    batch = next((s.value for s in own if s.key == "train.batch_size"), 64)
    return batch / speed, planned.extra(config.data.image_size) + SLACK * cost.memory(batch)


def measured(name: str, case: tuple[int, str, list[str]], steps: int, runs: Path) -> tuple[float, float]:
    """Seconds of a step, and bytes, of the program itself."""
    stage, data, changes = case
    folder = runs / name.replace(", ", "-").replace(" ", "-")
    path = f"configs/stage{stage}/{data}.yaml"
    words = [path] if (ROOT / path).is_file() else []
    words += [f"run_dir={folder}", f"train.max_steps={steps}", f"train.log_every={max(1, steps // 4)}", *changes]
    words += ["tracking.wandb=disabled", "train.eval_every=1000000", "train.checkpoint_every=1000000"]
    if stage == 2:
        words.append(f"stage1={runs / f'stage-1-{data}'}")
    child = subprocess.Popen([sys.executable, f"stage{stage}/train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"stage{stage}/train.py {' '.join(words)}: exit status {status}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line][-2:]
    batch = read_yaml(folder / "config.yaml")["train"]["batch_size"]
    return batch * sum(1 / speed for speed in speeds) / len(speeds), 1024.0 * usage.ru_maxrss


def main(options: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    print("| configuration | s a step: predicted | measured | GB: predicted | measured |\n|---|---|---|---|---|")
    for name in options.only:
        seconds, memory = measured(name, CASES[name], options.steps, options.runs)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # a process that has measured before is larger
            guess, bytes_ = fresh.submit(predicted, CASES[name]).result()
        pairs = ((guess, seconds, 4), (bytes_ / 1e9, memory / 1e9, 2))
        cells = [f"{a:.{digits}f} ({a / b - 1:+.0%}) | {b:.{digits}f}" for a, b, digits in pairs]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs/plan"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    main(parser.parse_args())
