"""Quality of a tokenizer after a given time of training, beside other people's quantizer and tokenizer.

python tests/benchmarks/time_to_quality.py [data=emoji64] [seconds=90] [seeds=0,1] [arms=ours,vqp,diffusers]
    [out=runs/time_to_quality] [peer_lr=1e-4] [profile=true] [SECTION.KEY=VALUE ...]

Each arm trains for as many seconds on the same split and the same batches, in turn, in one process:

- ours: stage1/train.py itself, with configs/stage1/DATA.yaml (digits have none, and take the defaults).
- vqp: the same program with the quantizer of vector-quantize-pytorch, as its README recommends.
- diffusers: diffusers.VQModel with about as many parameters and the same code map, number of codes and dimension of the
  codes; its own loss, and Adam at the constant learning rate of its training script (peer_lr).

The figures are of all held-out images, with the average of the weights if an arm has one; measuring stops the clock.
PSNR and perceptual distance are means over the images. Codes in use are those of the held-out images, and those of the
training images since the row before, which is also what images/s are of. OUT gets the curves, the figures as JSON
lines, and each run of our program. profile=true trains no arm: it prints which operators the time of ours goes to.
SECTION.KEY=VALUE are further settings of stage1/train.py. Run it alone.
"""

import json
import math
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import VQModel as Diffusers
from matplotlib import pyplot
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from vector_quantize_pytorch import VectorQuantize

from vqgen.cli.launch import make_up_for_launcher
from vqgen.cli.parse import load_config
from vqgen.cli.sections import STAGE1_SECTIONS
from vqgen.codes import CodeLayout
from vqgen.data.images import ImageSet, load_images, some_rows
from vqgen.data.order import Place, image_batches, seed_step
from vqgen.errors import InputError, require, require_choice
from vqgen.evaluation.metrics import CodeUsage, image_psnr
from vqgen.evaluation.perceptual import PerceptualDistance
from vqgen.quantizers import QUANTIZERS, Quantizer, QuantizerOutput
from vqgen.settings import Stage1Config
from vqgen.tokenizers import build_tokenizer
from vqgen.tokenizers.vqmodel import from_uint8, to_uint8
from vqgen.training.run import Now, Run
from vqgen.training.schedule import Budget, num_parameters
from vqgen.training.stop import Stop

ROOT = Path(__file__).parents[2]
ARMS = {"ours": "vqgen", "vqp": "vqgen + VectorQuantize", "diffusers": "diffusers.VQModel"}
THEIRS = "vector-quantize-pytorch"
QUARTERS = (0.25, 0.5, 0.75, 1.0)
MARKS = (0.01, 0.025, *(i / 20 for i in range(1, 21)))  # shares of the budget at which the curve has a point
CURVE_IMAGES = 500  # held-out images of a point that is not at a quarter
FEW = 128  # images per batch of the evaluation
WARM_UP, PROFILED = 10, 20  # steps
PRODUCTS = ("conv", "mm", "::linear", "matmul", "attention")  # parts of the names of convolutions and matrix products


class TheirQuantizer(Quantizer):
    """vector-quantize-pytorch's VectorQuantize with what its README recommends against unused codes."""

    def __init__(self, codebook_size: int = 512, code_dim: int = 8):
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.theirs = VectorQuantize(
            code_dim, codebook_size, use_cosine_sim=True, kmeans_init=True, threshold_ema_dead_code=2
        )

    def quantize(self, z: Tensor) -> QuantizerOutput:
        z_q, codes, loss = self.theirs(z)  # (B, N, D), (B, N)
        return QuantizerOutput(z_q, codes[..., None], loss.sum())

    def decode(self, codes: Tensor) -> Tensor:
        return self.theirs.get_output_from_indices(codes[..., 0])


class TheirTokenizer(nn.Module):
    """diffusers.VQModel with the interface of ours, and the width that brings it nearest to a number of parameters.

    The widths grow as in the configurations that diffusers' training script shows.
    """

    def __init__(self, channels: int, stride: int, layout: CodeLayout, code_dim: int, parameters: int):
        super().__init__()
        levels = stride.bit_length()  # each level but the last halves the side
        factors = [1, *[2] * (levels - 2), 4] if levels > 1 else [1]

        def build(width: int) -> Diffusers:
            return Diffusers(
                in_channels=channels,
                out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=tuple(width * factor for factor in factors),
                latent_channels=code_dim,
                num_vq_embeddings=layout.codebook_sizes[0],
                norm_num_groups=4,  # so that there are widths near every number of parameters
            )

        with torch.device("meta"):
            distance = {width: abs(num_parameters(build(width)) - parameters) for width in range(4, 257, 4)}
        self.net = build(min(distance, key=distance.__getitem__))
        self.map = layout.shapes[0][1:]

    def forward(self, x: Tensor) -> tuple[Tensor, list[QuantizerOutput]]:
        z_q, loss, (_, _, codes) = self.net.quantize(self.net.encode(x).latents)
        x_rec = self.net.decode(z_q, force_not_quantize=True).sample
        return x_rec, [QuantizerOutput(z_q, codes.view(len(x), 1, *self.map), loss)]


class Meter:
    """Measures one arm at each of `MARKS`: wholly at the quarters, and between them only the PSNR of some images.

    Attributes:
        points: figures by name, one dict a measurement.
    """

    def __init__(self, images: ImageSet, layout: CodeLayout, device: torch.device):
        self.images, self.layout, self.device = images, layout, device
        self.perceptual = PerceptualDistance().to(device)
        self.curve_rows = some_rows(len(images), CURVE_IMAGES)
        self.points: list[dict[str, float]] = []
        self.share, self.at_quarter = 0.0, False
        self.seen = self.seconds = 0.0  # training images and seconds at the last quarter

    def due(self, share: float) -> bool:
        """Whether a mark lies between the last share that was asked for and this one."""
        before, self.share = self.share, share
        self.at_quarter = any(before < mark <= share for mark in QUARTERS)
        return any(before < mark <= share for mark in MARKS)

    @torch.no_grad()
    def measure(self, model: nn.Module, seen: int, seconds: float, usage: CodeUsage) -> None:
        """Adds a point after so many training images and seconds; `usage` has the codes since the last quarter."""
        rows = range(len(self.images)) if self.at_quarter else self.curve_rows
        held_out = CodeUsage(self.layout, self.device)
        psnr, perceptual = torch.zeros(len(self.images)), torch.zeros(len(self.images))
        for batch in torch.as_tensor(rows).split(FEW):
            x = self.images.__getitems__(batch.numpy())[0].to(self.device)
            x_rec, q = model(from_uint8(x))
            x_rec = to_uint8(x_rec)
            psnr[batch] = image_psnr(x_rec, x).cpu()
            if self.at_quarter:
                perceptual[batch] = self.perceptual(from_uint8(x_rec), from_uint8(x)).cpu()
            held_out.update([out.codes for out in q])
        point = {"seconds": seconds, "share": self.share, "curve_psnr": psnr[self.curve_rows].mean().item()}
        if self.at_quarter:
            point |= {"psnr": psnr.mean().item(), "perceptual": perceptual.mean().item()}
            point |= {"usage": held_out.compute()["usage"].item(), "train_usage": usage.compute()["usage"].item()}
            point["images_per_second"] = (seen - self.seen) / (seconds - self.seconds)
            self.seen, self.seconds = seen, seconds
        self.points.append(point)
        print(f"{seconds:7.1f} s {point['curve_psnr']:6.2f} dB", flush=True)


class MeasuredRun(Run):
    """The run of stage1/train.py, which is measured where it would save; it saves and evaluates at its end only."""

    def __init__(self, config: Stage1Config, meter: Meter):
        super().__init__(config, 0, Stop())
        self.meter = meter

    def steps(self) -> Iterator[Now]:
        for now in super().steps():
            yield now._replace(evaluates=now.ends, saves=self.meter.due(now.share), logs=False)

    def save(self, now: Now, state: Any, model: Any) -> None:
        with self.paused():
            seen = now.step * self.config.train.batch_size
            self.meter.measure(model[""].model, seen, self.budget.seconds, state.parts["usage"])
        if now.ends:
            super().save(now, state, model)


class ProfiledRun(Run):
    """The run of stage1/train.py with a profile of some of its steps, everything between two steps included.

    Attributes:
        profile: the profile.
        seconds: the seconds of the profiled steps.
    """

    def __init__(self, config: Stage1Config):
        super().__init__(config, 0, Stop())
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def steps(self) -> Iterator[Now]:
        for now in super().steps():
            if now.step == WARM_UP:
                self.profile.start()
                start = time.perf_counter()
            if now.ends:
                self.seconds = time.perf_counter() - start
                self.profile.stop()
            yield now._replace(evaluates=False, saves=False, logs=False)


def stage1_config(data: str, seed: int, out: Path, settings: Sequence[str]) -> Stage1Config:
    """What `stage1/train.py configs/stage1/DATA.yaml` would train with, its log and checkpoints aside."""
    path = ROOT / f"configs/stage1/{data}.yaml"
    known = ["digits", *sorted(file.stem for file in path.parent.glob("*.yaml"))]
    require_choice("data", data, known, "configuration in configs/stage1/")
    given = [] if data == "digits" else [str(path)]
    own = [f"run_dir={out}", f"seed={seed}", "tracking.wandb=disabled", "train.milestone_every=null"]
    return load_config(Stage1Config, [*given, *own, *settings], STAGE1_SECTIONS)


def train_ours(config: Stage1Config, run: Run) -> None:
    """Trains by stage1/train.py's own loop."""
    with run:
        runpy.run_path(str(ROOT / "stage1/train.py"))["train"](config, run)
    require(run.diverged is None, f"{config.run_dir}: {run.diverged}")
    if run.stop.asked:
        sys.exit(f"{config.run_dir}: stopped by {run.stop.reason}")


def train_theirs(model: TheirTokenizer, train_set: ImageSet, config: Stage1Config, lr: float, meter: Meter) -> None:
    """Trains diffusers.VQModel on the batches of stage1/train.py: squared error and its quantizer's loss, Adam."""
    size, device = config.train.batch_size, meter.device
    optimizer, usage = torch.optim.Adam(model.parameters(), lr=lr), CodeUsage(meter.layout, device)
    budget = Budget(config.train.max_steps, config.train.max_seconds)
    batches = image_batches(train_set, Place(config.seed, size, 1, 0), data=config.data, device=device)
    budget.start()
    for step, (x, _) in enumerate(batches):
        share = budget.share(step, device)
        if meter.due(share):
            with budget.paused():
                meter.measure(model.eval(), step * size, budget.seconds, usage)
                model.train()
        if share >= 1:
            return
        seed_step(config.seed, step)
        x_rec, q = model(x)
        (F.mse_loss(x_rec, x) + q[0].loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        usage.update([q[0].codes])


def race(arm: str, config: Stage1Config, lr: float) -> list[dict[str, float]]:
    """Trains one arm, and returns its figures at each mark."""
    train_set, held_out = load_images(config.data)
    whole = isinstance(train_set, ImageSet)
    require(whole, "data.stream=true: a stream would give the arms other batches; use data.stream=false")
    ours = build_tokenizer(**{"channels": train_set.channels, **config.model})
    layout, parameters = ours.code_layout(held_out.image_size), num_parameters(ours)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = Meter(held_out, layout, device)
    if arm == "diffusers":
        torch.manual_seed(config.seed)
        model = TheirTokenizer(ours.channels, ours.stride, layout, ours.quantizer.code_dim, parameters)
        parameters = num_parameters(model)
        train_theirs(model.to(device).train(), train_set, config, lr, meter)
    else:
        if arm == "vqp":
            codes = {key: getattr(ours.quantizer, key) for key in ("codebook_size", "code_dim")}
            config.model["quantizer"] = {"name": THEIRS, **codes}
            QUANTIZERS[THEIRS] = TheirQuantizer
        try:
            train_ours(config, MeasuredRun(config, meter))
        finally:
            QUANTIZERS.pop(THEIRS, None)  # tests of the command line would find it
    return [{"parameters": parameters, **point} for point in meter.points]


Results = dict[str, list[list[dict[str, float]]]]  # arm -> seed -> points


def at_quarters(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """The points that were measured wholly."""
    return [point for point in points if "psnr" in point]


def cell(values: Sequence[float], form: str) -> str:
    """The mean of the seeds' values, and their deviation if there are several."""
    spread = f" ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
    return f"{format(statistics.mean(values), form)}{spread}"


def table(results: Results) -> str:
    """A row for each arm and quarter of the budget."""
    forms = {"psnr": ".2f", "perceptual": ".4f", "usage": ".1%", "train_usage": ".1%", "images_per_second": ".0f"}
    lines = ["| | parameters | seconds | PSNR, dB | perceptual | codes, held out | codes, training | images/s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for arm, seeds in results.items():
        for points in zip(*map(at_quarters, seeds), strict=False):
            cells = [cell([point[name] for point in points], form) for name, form in forms.items()]
            first = f"| {ARMS[arm]} | {points[0]['parameters'] / 1e6:.2f} M | {points[0]['seconds']:.1f} |"
            lines.append(f"{first} {' | '.join(cells)} |")
    return "\n".join(lines)


def time_to(level: float, seconds: Sequence[float], quality: Sequence[float]) -> float | None:
    """When a curve first reaches a level, between its points by a straight line; None if it never does.

    A curve that begins above the level reaches it at its first point at the latest.
    """
    before: tuple[float, float] | None = None
    for now, value in zip(seconds, quality, strict=True):
        if value >= level:
            if before is None:
                return now
            start, low = before
            return start + (now - start) * (level - low) / (value - low)
        before = now, value
    return None


def summary(results: Results) -> list[str]:
    """How far ours ends above each other arm, and how soon it has that arm's final quality; means over the seeds."""
    lines = []
    for arm in [arm for arm in results if arm != "ours" and "ours" in results]:
        above, times, shares = [], [], []
        for ours, theirs in zip(results["ours"], results[arm], strict=True):
            above.append(ours[-1]["psnr"] - theirs[-1]["psnr"])
            when = time_to(theirs[-1]["curve_psnr"], [p["seconds"] for p in ours], [p["curve_psnr"] for p in ours])
            times.append(math.inf if when is None else when)
            shares.append(times[-1] / theirs[-1]["seconds"])
        sooner = f"its final quality is reached after {cell(times, '.1f')} s, {cell(shares, '.1%')} of its time"
        sooner = sooner if math.isfinite(max(times)) else "not every seed reaches its final quality"
        lines.append(f"{ARMS['ours']} against {ARMS[arm]}: {cell(above, '+.2f')} dB at the end; {sooner}")
    return lines


def draw(results: Results, title: str, path: Path) -> None:
    """Draws PSNR and perceptual distance over time, a line for each seed."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    what = {"curve_psnr": "PSNR of held-out images (dB)", "perceptual": "perceptual distance (lower is better)"}
    for axis, (name, label), mark in zip(axes, what.items(), ("", "."), strict=True):
        ends = {}
        for (arm, seeds), colour in zip(results.items(), ("tab:blue", "tab:green", "tab:orange"), strict=False):
            for points in seeds:
                x, y = zip(*((point["seconds"], point[name]) for point in points if name in point), strict=True)
                axis.plot(x, y, color=colour, lw=1.5, alpha=0.8, marker=mark)
            ends[arm] = (y[-1], x[-1], colour)
        axis.set(xlabel="training time (s)", ylabel=label, xlim=(0, None))
        low, high = axis.get_ylim()
        place = -math.inf
        for arm, (y, x, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
            place = max(
                y, place + 0.06 * (high - low)
            )  # labels of lines that end close together lie one above the other
            axis.annotate(
                ARMS[arm], (x, place), xytext=(8, 0), textcoords="offset points", color=colour, va="center", fontsize=9
            )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def operators(run: ProfiledRun) -> str:
    """The operators that take most of the profiled steps' time, and the share of convolutions and matrix products."""
    found = [(event.key, event.self_cpu_time_total / 1e6, event.count) for event in run.profile.key_averages()]
    found.sort(key=lambda row: -row[1])
    products = sum(seconds for name, seconds, _ in found if any(part in name for part in PRODUCTS))
    lines = ["| operator | share of the step | calls a step |", "|---|---|---|"]
    lines += [f"| {name} | {s / run.seconds:.1%} | {count / PROFILED:g} |" for name, s, count in found[:15]]
    rest = run.seconds - sum(seconds for _, seconds, _ in found)
    lines += [f"| all others | {sum(s for _, s, _ in found[15:]) / run.seconds:.1%} | |"]
    lines += [f"| between operators: Python | {rest / run.seconds:.1%} | |"]
    return "\n".join([*lines, f"convolutions and matrix products: {products / run.seconds:.1%} of a training step"])


def main(options: dict[str, str], settings: Sequence[str]) -> None:
    data, out = options["data"], Path(options["out"])
    require_choice("profile", options["profile"], ("true", "false"), "choice")
    if options["profile"] == "true":
        with tempfile.TemporaryDirectory() as folder:
            few = f"train.max_steps={WARM_UP + PROFILED}"
            config = stage1_config(data, 0, Path(folder) / "run", [*settings, few, "train.max_seconds=null"])
            train_ours(config, run := ProfiledRun(config))
        print(operators(run))
        return
    arms, seeds = options["arms"].split(","), options["seeds"].split(",")
    require(all(map(str.isdecimal, seeds)), f"seeds={options['seeds']}: must be whole numbers, as in seeds=0,1")
    for arm in arms:
        require_choice("arms", arm, ARMS, "arm")
    require(not out.exists(), f"out={out}: is there already; remove it, or name another folder")
    results: Results = {arm: [] for arm in arms}
    for seed in map(int, seeds):
        for arm in arms:
            print(f"\n{ARMS[arm]}, seed {seed}", flush=True)
            budget = ["train.max_steps=null", f"train.max_seconds={options['seconds']}"]
            config = stage1_config(data, seed, out / f"{arm}-{seed}", [*budget, *settings])
            results[arm].append(race(arm, config, float(options["peer_lr"])))
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "figures.jsonl", "a") as file:
                for point in results[arm][-1]:
                    file.write(json.dumps({"data": data, "arm": arm, "seed": seed, **point}) + "\n")
    print("", table(results), "", *summary(results), sep="\n")
    draw(results, f"{data}: seeds {options['seeds']}; CPU threads: {torch.get_num_threads()}", out / "curves.png")
    print(f"{out / 'figures.jsonl'}, {out / 'curves.png'}")


if __name__ == "__main__":
    known = {"data": "emoji64", "seconds": "90", "seeds": "0,1", "arms": "ours,vqp,diffusers"}
    known |= {"out": "runs/time_to_quality", "peer_lr": "1e-4", "profile": "false"}
    words = sys.argv[1:]
    own = [word for word in words if word.startswith(tuple(f"{key}=" for key in known))]
    try:
        make_up_for_launcher()
        main(known | dict(word.split("=", 1) for word in own), [word for word in words if word not in own])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
