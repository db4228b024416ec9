"""Reads a run's config.yaml for the programs that follow the run: its images, its tracking, its codes."""

import dataclasses
import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqgen.cli.reflect import check_options
from vqgen.data.images import ImageSet, load_images
from vqgen.data.sources.hub import PREFIX as HUB
from vqgen.data.sources.remote import is_remote
from vqgen.data.stream import ImageStream
from vqgen.errors import InputError, require, section
from vqgen.settings import DataConfig, TrackingConfig
from vqgen.training.checkpoints import load_checkpoint
from vqgen.yaml_file import WORKING_DIR, read_yaml

BUILT_IN_SOURCES = ("digits",)
UNSAID = ("channels", "cache_gb", "workers", "augment")  # data settings that say nothing about which images a run takes


class RunData(NamedTuple):
    """The data settings of a program that follows a run."""

    config: DataConfig
    own: bool  # whether the source is the run's own
    taken: str  # one line that names the settings taken from the run; empty if the user gave all of them


def run_data(run: Path, given: Mapping[str, Any], channels: int) -> RunData:
    """The data settings of a run, each replaced by the user's if the user gives one.

    If the user gives another source, the run's `val_source` is dropped, because it belongs to the run's source.

    Args:
        run: the run's folder; a shared tokenizer has no config.yaml there.
        given: the user's `data` settings; `channels: null` takes the run's.
        channels: channels of the run's model.

    Raises:
        InputError: neither the run nor the user names the images, the images no longer exist, or they do not have the
            model's channels.
    """
    given = {key: value for key, value in given.items() if value is not None or key != "channels"}
    own = _section(run, "data")
    same, left_out = True, None
    if "source" in given:
        same = "source" in own and _is_same(given["source"], _found(run, own["source"]))
        left_out = None if same or "val_source" in given else own.pop("val_source", None)
    taken = {key: value for key, value in own.items() if key not in given and value is not None}
    for key in {"source", "val_source"} & taken.keys():
        taken[key] = _found(run, taken[key])
        _check_there(run, key, own[key], taken[key])
    settings = {**taken, **given}
    require("source" in settings, f"{run} does not say which images it used; give data.source=")
    settings["channels"] = settings.get("channels", channels)
    require(settings["channels"] == channels, f"data.channels={settings['channels']}: {run} is for {channels}")
    config = DataConfig(**check_options(DataConfig, settings, "data"))
    return RunData(config, same, _said(run, taken, left_out))


def run_images(run: Path, given: Mapping[str, Any], channels: int) -> tuple[ImageSet, ImageSet, bool]:
    """The training and the held-out images of a run, or of the source that the user gives instead.

    The third value says whether they are the run's own images: the source is the same, or the checkpoint's hash of the
    images is. Some images stand for those of a stream.

    Raises:
        InputError: as in `run_data`; or no image loads.
    """
    config, same, _ = run_data(run, given, channels)
    with section("data"):
        train, held_out = load_images(config)
    if not same:
        checkpoint = load_checkpoint(run)
        same = checkpoint is not None and checkpoint["data"] == train.fingerprint
    return train.sample if isinstance(train, ImageStream) else train, held_out, same


def run_tracking(run: Path, given: Mapping[str, Any]) -> TrackingConfig:
    """The tracking settings of a run, each replaced by the user's if the user gives one."""
    return TrackingConfig(**check_options(TrackingConfig, {**_section(run, "tracking"), **given}, "tracking"))


def codes_folder(run: Path) -> Path:
    """The folder of a stage-2 run's encoded data, whether it exists or not."""
    settings = _settings(run)
    if settings.get("codes_dir"):
        return Path(_found(run, settings["codes_dir"]))
    return Path(_found(run, settings["stage1"]) if "stage1" in settings else run) / "codes"


def writable_codes_folder(run: Path, cache: Path) -> Path:
    """The folder of a stage-2 run's encoded data if it can be written, or else one in the cache."""
    own = codes_folder(run)
    return own if os.access(own, os.W_OK) else cache / "codes"


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def _section(run: Path, name: str) -> dict[str, Any]:
    return dict(_settings(run).get(name) or {})


def _found(run: Path, path: str) -> str:
    """Turns a path in a run's config.yaml into one that is valid from the current folder.

    A relative path starts at the folder in which the run was started. If nothing is there, it starts at the current
    folder, because the project may have moved, or the run may come from another machine.
    """
    started_in = _settings(run).get(WORKING_DIR)
    if not _is_path(path) or os.path.isabs(path) or started_in is None or started_in == os.getcwd():
        return path
    there = os.path.join(started_in, path)
    return there if _exists(there) else path


def _check_there(run: Path, key: str, saved: str, found: str) -> None:
    """Raises InputError if a source taken from the run does not exist."""
    if not _is_path(found) or _exists(found):
        return
    there = os.path.join(_settings(run).get(WORKING_DIR, ""), saved)
    places = "is not there" + (f", nor at {there}" if there != os.path.abspath(saved) and there != saved else "")
    raise InputError(f"data.{key}={saved} of {run} {places}; give data.{key}=")


def _is_path(source: str) -> bool:
    """Whether a source is a path, and not built in, an address or a data set of the Hub."""
    return source not in BUILT_IN_SOURCES and not is_remote(source) and not source.startswith(HUB)


def _is_same(source: str, other: str) -> bool:
    """Whether two sources are the same, whatever their paths."""
    return source == other or (_is_path(source) and os.path.realpath(source) == os.path.realpath(other))


def _exists(path: str) -> bool:
    """Whether a file or folder exists, or at least one that a pattern stands for."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or any(glob.iglob(re.sub(r"\{[^{}]*\}", "*", path)))


def _said(run: Path, taken: Mapping[str, Any], left_out: str | None) -> str:
    """One line that names the settings taken from the run; it leaves out unimportant settings at their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    important = ("source", "image_size")
    said = [f"{k} {v}" for k, v in taken.items() if k not in UNSAID and (k in important or v != defaults.get(k))]
    if left_out is not None:
        said.append(f"but not val_source {left_out}, which belongs to another source")
    return f"data: as {run / 'config.yaml'} says: {', '.join(said)}" if said else ""
