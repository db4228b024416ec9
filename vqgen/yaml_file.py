"""Files of settings: YAML in which 1e-3 is a number and each key occurs once."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vqgen.errors import InputError

WORKING_DIR = "working_dir"  # the key in a run's config.yaml that names the folder its relative paths start from

# PyYAML raises these for text that is not YAML. It converts tagged values, as in `!!int x`, without checking them.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        InputError: there is no such file, or it holds no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such config file; give a .yaml, and settings as key=value")
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except (*YAML_ERRORS, OSError) as error:
        raise InputError(f"{path}: not a YAML file of settings: {first_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a YAML file of settings: expected `key: value` lines")
    return content


def as_saved(config: Any) -> dict[str, Any]:
    """The content that `save_config` writes: every setting, and the working directory."""
    return {**asdict(config), WORKING_DIR: os.getcwd()}


def save_config(config: Any, path: Path) -> None:
    """Writes a configuration to a file, completely or not at all."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        yaml.dump(as_saved(config), file, _Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
    beside.rename(path)


def first_line(error: Exception) -> str:
    """Says in one line what is wrong with a file of settings."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"  # str(error) would begin with earlier lines
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number and a date as text, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would otherwise be read as a number."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quotes = "'" if _EXPONENT.match(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, quotes)


_EXPONENT = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _represent_text)
