"""Digests of short runs of the training programs, to show that a refactoring changes no bit.

python tests/soak/golden.py DIGESTS.json                       # before: makes the runs and writes their digests
python tests/soak/golden.py AFTER.json --against DIGESTS.json  # after: the same, then a table of equal digests

The digests depend on the processor and on torch, so run both commands on one machine. It takes about three minutes.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import launch_two, shell

TIMED = ("train/images_per_second", "train/data_time", "train/perceptual_time")
ALL_LOSSES = (
    "loss.perceptual.name=alex loss.perceptual.every=4 loss.perceptual.start=0.2 loss.adversarial.name=hinge "
    "loss.adversarial.start=0.4 loss.adversarial.lead=0.2 loss.adversarial.lecam=0.01 loss.adversarial.r1=0.1 "
    "discriminator.width=8 discriminator.layers=2 train.accumulation=2 data.flip=true"
)
RUNS = {  # name: program and settings; the priors use the tokenizer of the first run
    "vqvae": "stage1/train.py configs/debug/stage1.yaml",
    "vqgan": f"stage1/train.py configs/debug/stage1.yaml {ALL_LOSSES}",
    "drawn codes": (
        "stage1/train.py configs/debug/stage1.yaml model.quantizer.temperature=0.5 loss.rec=l1 data.cache_gb=0 "
        "data.image_size=24"
    ),
    "prior": "stage2/train.py configs/debug/stage2.yaml stage1={tokenizer} codes_dir={run}/codes",
    "prior, flips": (
        "stage2/train.py configs/debug/stage2.yaml stage1={tokenizer} codes_dir={run}/codes data.flip=true "
        "train.accumulation=2 model.attention_dropout=0.2"
    ),
    "gan": "stage1/train_gan.py configs/debug/gan.yaml",
    "gan, flips": "stage1/train_gan.py configs/debug/gan.yaml train.accumulation=2 data.flip=true loss=hinge",
}


def made(folder: Path) -> dict[str, dict[str, str]]:
    """The digests of all runs: on one process, on two, and resumed from the middle."""
    digests = {}
    for name, command in RUNS.items():
        for processes in (1, 2):
            run = folder / f"{name.replace(', ', '_').replace(' ', '_')}_{processes}"
            launcher = "python" if processes == 1 else launch_two()
            filled = command.format(tokenizer=folder / "vqvae_1", run=run)
            line = f"{launcher} {filled} run_dir={run} tracking.wandb=disabled"
            shell(line)
            digests[f"{name}, {processes}"] = digest(run)
            if processes == 1:
                shutil.rmtree(run / "checkpoints/step_00000040")
                assert "going on from step 20" in shell(line)
                digests[f"{name}, resumed"] = digest(run)
    return digests


def digest(run: Path) -> dict[str, str]:
    """SHA-256 digests by name: the metrics, each file of the model, each part of the last checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [sorted((k, v) for k, v in line.items() if k not in TIMED) for line in lines]
    found = {"metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}
    for file in sorted((run / "model").rglob("*.safetensors")):
        found[str(file.relative_to(run))] = hash_of(load_file(file))
    state = torch.load(run / "checkpoints/step_00000040/state.pt", weights_only=True)
    for part in sorted(state.keys() - {"seconds", "logged", "means"}):
        found[f"checkpoint {part}"] = hash_of(state[part])
    return found


def hash_of(value: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and numbers."""
    digest = hashlib.sha256()
    for part in flat(value):
        digest.update(part)
    return digest.hexdigest()


def flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    else:
        yield repr(value).encode()


def table(now: dict[str, dict[str, str]], before: dict[str, dict[str, str]]) -> tuple[str, bool]:
    """A line for each run, and whether all are equal."""
    lines, all_equal = ["| run | equal | different or missing |", "|---|---|---|"], True
    for name in before:
        parts = before[name]
        differ = [part for part in parts if now.get(name, {}).get(part) != parts[part]]
        all_equal = all_equal and not differ
        lines.append(f"| {name} | {len(parts) - len(differ)} of {len(parts)} | {', '.join(differ)} |")
    return "\n".join(lines), all_equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digests = made(Path(folder))
    arguments.out.write_text(json.dumps(digests, indent=1))
    if arguments.against:
        text, all_equal = table(digests, json.loads(arguments.against.read_text()))
        print(text)
        sys.exit(not all_equal)
