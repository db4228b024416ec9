"""The log of a run: metrics.jsonl always, a progress bar or plain lines, and wandb where it is available."""

import json
import logging
import math
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqgen.errors import need
from vqgen.settings import TrackingConfig

logger = logging.getLogger("vqgen")
SERVICE_ENDS = 20.0  # seconds


def _end_service() -> None:
    """Ends the process that wandb has started for itself; kills it if it does not end, as was seen once."""
    import wandb

    def kill() -> None:
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()

    killer = threading.Timer(SERVICE_ENDS, kill)
    killer.start()
    try:
        wandb.teardown()
    finally:
        killer.cancel()


class Tracker:
    """Writes a run's numbers and pictures on the main process; does nothing on the others.

    Args:
        run_dir: the run's folder.
        config: the run's configuration, with a `tracking` section.
        logged: length of metrics.jsonl in bytes at the checkpoint, from `flush`; any later lines are dropped.
        is_main: whether this is the main process.
        facts: facts for wandb beside the configuration, such as the number of parameters.
    """

    def __init__(self, run_dir: Path, config: Any, *, logged: int, is_main: bool, facts: Mapping[str, Any]):
        self.is_main = is_main
        if not is_main:
            return
        self.run_dir = run_dir
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            os.truncate(self.path, min(logged, self.path.stat().st_size))
        self.wandb = _Wandb(run_dir, config.tracking, asdict(config) | dict(facts))
        self.bar = tqdm(total=100, bar_format="{l_bar}{bar}| {desc}", leave=False, disable=None)

    def progress(self, step: int, share: float, seconds_left: float, **shown: float) -> None:
        """Moves the bar; prints a line if the output is not a terminal."""
        if not self.is_main:
            return
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        minutes, seconds = divmod(math.ceil(seconds_left), 60)
        text = f"step {step}  {numbers}  {minutes}:{seconds:02d} left"
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.n = min(100, round(100 * share))
            self.bar.set_description_str(text)

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Writes one line of metrics.jsonl, and sends the same to wandb."""
        if not self.is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.wandb.log(numbers, step)

    def flush(self) -> int:
        """Waits until all lines are on the disk, and returns their bytes; a resumed run does not write them again."""
        with open(self.path, "a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Writes samples/NAME_STEP.png, and sends it to wandb."""
        if not self.is_main:
            return
        (self.run_dir / "samples").mkdir(exist_ok=True)
        image.save(self.run_dir / "samples" / f"{name}_{step:08d}.png")
        self.wandb.picture(name, image, step)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar and the wandb run."""
        if self.is_main:
            self.bar.close()
            self.wandb.close()


def log_evaluation(
    run_dir: Path, tracking: TrackingConfig, figures: Mapping[str, float], pictures: Mapping[str, Image.Image]
) -> None:
    """Sends an evaluation's figures to the summary of a run's wandb (they belong to no step), and its pictures."""
    run = _Wandb(run_dir, tracking, {})
    run.summary({f"evaluation/{name}": value for name, value in figures.items()})
    for name, image in pictures.items():
        run.picture(f"evaluation/{name}", image, None)
    run.close()


class _Wandb:
    """A wandb run that never stops training: after the first failure it prints one line and logs nothing more."""

    def __init__(self, run_dir: Path, tracking: TrackingConfig, config: dict[str, Any]):
        self.run: Any = None
        if tracking.wandb in ("online", "offline"):
            need("wandb", "tracking", f"tracking.wandb={tracking.wandb}")
        if tracking.wandb != "disabled":
            self._attempt(lambda: self._start(run_dir, tracking, config))

    def _start(self, run_dir: Path, tracking: TrackingConfig, config: dict[str, Any]) -> None:
        mode: Any = tracking.wandb if tracking.wandb != "auto" else _mode_of_environment()
        if mode == "disabled":
            return
        if find_spec("wandb") is None:
            print("wandb is not installed, so metrics.jsonl alone has the figures; pip install 'vqgen[tracking]'")
            return
        import wandb  # imported here, so that a run without wandb does not wait for it

        # The folder keeps one id, so that a resumed run continues the same wandb run.
        id_file = run_dir / "wandb" / "id"
        if not id_file.exists():
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(secrets.token_hex(4))
        options: dict[str, Any] = {
            "project": tracking.project or os.environ.get("WANDB_PROJECT") or "vqgen",
            "name": os.environ.get("WANDB_NAME") or "-".join(run_dir.parts[-2:]),
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": run_dir,
            "config": config,
            "settings": wandb.Settings(silent=True, console="off", init_timeout=60),
        }
        try:
            mode = mode or ("online" if wandb.login(prompt=False) else "offline")
            self.run = wandb.init(mode=mode, **options)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
            _end_service()  # otherwise wandb would say that the id is in use
            print(f"wandb: not reached ({_first_line(error)}), so this run is kept offline", flush=True)
            mode = "offline"
            self.run = wandb.init(mode=mode, **options)
        if mode in ("offline", "dryrun"):
            # `wandb sync` may replace an earlier file of a run by a later one, so each file holds all lines so far.
            lines = (run_dir / "metrics.jsonl").read_text().splitlines() if (run_dir / "metrics.jsonl").exists() else []
            for values in map(json.loads, lines):
                self.run.log(values, step=values.pop("step"))
            print(f"wandb: offline; to send this run to the site later: wandb sync {Path(self.run.settings.sync_dir)}")

    def log(self, numbers: dict[str, Any], step: int) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.log(numbers, step=step))

    def summary(self, numbers: dict[str, Any]) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.summary.update(numbers))

    def picture(self, name: str, image: Image.Image, step: int | None) -> None:
        if self.run is not None:
            import wandb

            self._attempt(lambda: self.run.log({name: wandb.Image(image)}, step=step))

    def close(self) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.finish())

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # no failure of a tracker may end a training run
            self.run = None
            logger.warning("wandb failed and is off for this run (%s); metrics.jsonl goes on", _first_line(error))


def _mode_of_environment() -> str | None:
    """The mode that wandb's own environment variables ask for; None if they do not say."""
    if os.environ.get("WANDB_DISABLED", "false").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    return os.environ.get("WANDB_MODE") or None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Arranges images, uint8 (N, H, W, C), in a grid with this number of columns; small images are enlarged."""
    n, height, width, channels = images.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 128, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        canvas[y * (height + gap) :, x * (width + gap) :][:height, :width] = image
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, 64 // width)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
