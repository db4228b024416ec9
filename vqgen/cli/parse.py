"""Turns the command line into a configuration.

A program takes `[CONFIG.yaml] [key=value ...]`. The dataclass has the defaults; the file changes some of them for one
kind of run; the command line changes some settings for one run.
"""

import keyword
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqgen.cli.reflect import Sections, complete_options, merge, no_such_key, plain, settings, takes_more
from vqgen.data.sources.remote import is_remote
from vqgen.errors import InputError, require
from vqgen.settings import ADDRESSES, PATHS
from vqgen.yaml_file import WORKING_DIR, YAML_ERRORS, first_line, read_yaml

C = TypeVar("C")


def is_setting(argument: str) -> bool:
    """Whether an argument is `key=value`, not a path; a path with a `=` exists, or has a `/` before its first `=`.

    A flag such as `--key=value` is a setting even if a file has that name.
    """
    key, equals, _ = argument.partition("=")
    if argument.startswith("--"):
        return True
    return bool(equals) and "/" not in key and not os.path.exists(argument)


def expand_home(path: str, key: str) -> str:
    """Replaces a leading `~` or `~user` by the home folder, unless a file or folder has exactly this name.

    Raises:
        InputError: the user does not exist, or the path is an address and its setting, `key`, takes none.
    """
    takes_address = key.rpartition(".")[2] in ADDRESSES
    require(takes_address or not is_remote(path), f"{key}={path}: is an address, but must be here; give a local path")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path.partition("/")[0]):
        raise InputError(f"{key}={path}: there is no home folder {path.partition('/')[0]}; write the whole path")
    return expanded


def load_config(cls: type[C], arguments: Sequence[str], sections: Sections) -> C:
    """Reads `[CONFIG.yaml] [key=value ...]` into a configuration of class cls.

    Raises:
        InputError: a file is missing or not YAML, a key does not exist, or a value has the wrong type or is one that no
            setting takes.
    """
    files = [a for a in arguments if not is_setting(a)]
    given = [a.removeprefix("--") for a in arguments if is_setting(a)]
    if len(files) > 1:
        raise InputError(f"{files[1]!r} is neither key=value nor the one config file, which is {files[0]!r} already")
    layers = [_read_layer(Path(expand_home(name, "CONFIG.yaml"))) for name in files]
    known = {key: kind for key, kind, *_ in settings(cls, sections)}
    for argument in given:
        key, _, text = argument.partition("=")
        expanded = key in ("data.source", "data.val_source") and sum(a.startswith(f"{key}=") for a in given) > 1
        require(not expanded, f"{key} is given more than once; quote what the shell expands: '{key}=...{{0..9}}.tar'")
        try:
            layer = plain(OmegaConf.from_dotlist([argument]))
            if known.get(key, "").startswith("str") and text not in ("null", "???"):
                layer = _nested(key, text)  # YAML would turn some texts into numbers or dates
            elif known.get(key, "").startswith(("list[int | str]", "list[str]")) and text not in ("null", "???"):
                texts = yaml.load(text, yaml.BaseLoader)  # texts only, because a class may be called 007 or yes
                layer = _nested(key, [texts or text] if isinstance(texts, str | None) else texts)
            layers.append(layer)
        except (*YAML_ERRORS, OmegaConfBaseException) as error:
            raise InputError(f"{argument}: {first_line(error)}; write key=value, lists as [1,2]") from error

    config: DictConfig = OmegaConf.structured(cls)
    for layer in layers:
        for key, value in _leaves(layer):
            if key in sections or any(k.startswith(f"{key}.") for k in known):
                require(value == {}, f"{key}: is a section; set its keys, as in {key}.KEY=VALUE (see --help)")
            elif key in known:  # OmegaConf would accept a list of lists or of sections as a list of numbers
                nested = value == {} or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
                require(not nested, f"{key}={value}: is a {known[key]}, without sections or lists in it; see --help")
            elif not _is_open(sections, key):
                raise InputError(no_such_key(key, list(known)))
        if layer.get("train", {}).get("mixed_precision") is False:
            layer["train"]["mixed_precision"] = "no"  # YAML reads a bare `no` as false
        config = merge(config, {_field(name): value for name, value in _with_homes(layer).items()})
    for name in sections:
        if "." not in name:
            given = plain(config[name])
            config[name] = _typed(given, complete_options(sections, name, given))
    return typing.cast(C, OmegaConf.to_object(config))


def _field(key: str) -> str:
    """The field that a key sets: one whose key is a word of Python has an underscore at its end."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _nested(key: str, value: Any) -> dict[str, Any]:
    """The layer that sets one key, such as `section.key`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _typed(given: Mapping[str, Any], complete: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, with the typed values from the complete options."""
    return {
        key: _typed(value, complete[key]) if isinstance(value, dict) else complete[key] for key, value in given.items()
    }


def _read_layer(path: Path) -> dict[str, Any]:
    """The settings in a file, which is the user's or a run's config.yaml."""
    content = read_yaml(path)
    content.pop(WORKING_DIR, None)
    try:
        return typing.cast(dict[str, Any], plain(OmegaConf.create(content)))
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: not a YAML file of settings: {first_line(error)}") from error


def _with_homes(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The layer with `~` expanded in each setting that is a path or a list of paths."""
    expanded: dict[str, Any] = {}
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            value = _with_homes(value, f"{key}.")
        elif name in PATHS and isinstance(value, str):
            value = expand_home(value, key)
        elif name in PATHS and isinstance(value, list):
            value = [expand_home(v, key) if isinstance(v, str) else v for v in value]
        expanded[name] = value
    return expanded


def _is_open(sections: Sections, key: str) -> bool:
    """Whether a key's innermost section accepts keys that its constructor does not name."""
    owner = max((name for name in sections if key.startswith(f"{name}.")), key=len, default=None)
    constructor = sections[owner] if owner else None
    return callable(constructor) and takes_more(constructor)


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every key, as section.key, with its value; the value of an empty section is {}."""
    for key, value in layer.items():
        remedy = "in a file a section is a line of its own, and its keys are indented below it"
        require("." not in str(key), f"{prefix}{key}: no such key, because it has a dot; {remedy}")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
