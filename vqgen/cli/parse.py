"""How the command line becomes a configuration.

A program takes `[CONFIG.yaml] [key=value ...]`: the dataclass holds the defaults, the file what one kind of run changes
of them, the command line what this one changes of both.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqgen.cli.reflect import Sections, complete_options, first_line, merge, no_such_key, plain, settings, takes_more
from vqgen.errors import InputError, require

C = TypeVar("C")

# What OmegaConf and PyYAML raise for text that is no YAML: PyYAML converts what has a tag, as in `!!int x`, unchecked.
YAML_ERRORS = (
    yaml.YAMLError,
    OmegaConfBaseException,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
)


def load_config(cls: type[C], arguments: Sequence[str], sections: Sections) -> C:
    """Reads `[CONFIG.yaml] [key=value ...]` into a configuration of class cls.

    Raises:
        InputError: a file that is not there or not YAML, a key that does not exist, a value of the wrong type or one
            that no setting takes.
    """
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise InputError(f"{files[1]!r} is neither key=value nor the one config file, which is {files[0]!r} already")
    layers = [read_yaml(Path(name)) for name in files]
    known = {key: kind for key, kind, *_ in settings(cls, sections)}
    for argument in [a for a in arguments if "=" in a]:
        key, _, text = argument.partition("=")
        expanded = key in ("data.source", "data.val_source") and sum(a.startswith(f"{key}=") for a in arguments) > 1
        require(not expanded, f"{key} is given more than once; quote what the shell expands: '{key}=...{{0..9}}.tar'")
        try:
            layer = plain(OmegaConf.from_dotlist([argument]))
            if known.get(key, "").startswith("str") and text not in ("null", "???"):
                layer = text  # as it is, whatever YAML would make of it
                for part in reversed(key.split(".")):
                    layer = {part: layer}
            layers.append(layer)
        except YAML_ERRORS as error:
            raise InputError(f"{argument}: {first_line(error)}; write key=value, lists as [1,2]") from error

    config: DictConfig = OmegaConf.structured(cls)
    for layer in layers:
        for key, value in _leaves(layer):
            if key in sections or any(k.startswith(f"{key}.") for k in known):
                require(value == {}, f"{key}: is a section; set its keys, as in {key}.KEY=VALUE (see --help)")
            elif key in known:  # OmegaConf takes any list for a list of numbers, if what is in it is no value
                nested = value == {} or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
                require(not nested, f"{key}={value}: is a {known[key]}, without sections or lists in it; see --help")
            elif not _is_open(sections, key):
                raise InputError(no_such_key(key, list(known)))
        if layer.get("train", {}).get("mixed_precision") is False:
            layer["train"]["mixed_precision"] = "no"  # a bare `no` is false in YAML
        config = merge(config, layer)
    for name in sections:
        if "." not in name:
            given = plain(config[name])
            config[name] = _typed(given, complete_options(sections, name, given))
    return typing.cast(C, OmegaConf.to_object(config))


def _typed(given: Mapping[str, Any], complete: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, with their values taken from all options, which have their type."""
    return {
        key: _typed(value, complete[key]) if isinstance(value, dict) else complete[key] for key, value in given.items()
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: no such file, or no YAML mapping in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file; give a .yaml, and settings as key=value")
    try:
        content = plain(OmegaConf.load(path))
    except (*YAML_ERRORS, OSError) as error:
        raise InputError(f"{path}: not a YAML file of settings: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a YAML file of settings: expected `key: value` lines")
    return content


def _is_open(sections: Sections, key: str) -> bool:
    """Whether the innermost section that a key is in takes keys that its constructor does not name."""
    owner = max((name for name in sections if key.startswith(f"{name}.")), key=len, default=None)
    constructor = sections[owner] if owner else None
    return callable(constructor) and takes_more(constructor)


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, as section.key, and its value: {} for an empty section."""
    for key, value in layer.items():
        remedy = "in a file a section is a line of its own, and its keys are indented below it"
        require("." not in str(key), f"{prefix}{key}: no such key, as it has a dot; {remedy}")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def save_config(config: Any, path: Path) -> None:
    """Writes the configuration as YAML, every default included; whole or not at all."""
    beside = path.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.structured(config), beside)
    beside.rename(path)
