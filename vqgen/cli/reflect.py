"""Reads a constructor's schema: its options, their types, and their meanings for --help."""

import ast
import copy
import difflib
import functools
import inspect
import itertools
import os
import textwrap
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqgen.errors import InputError, require, require_choice, require_options, section
from vqgen.yaml_file import first_line

Constructor = Callable[..., Any]

# The plain-dict sections of a configuration, with the constructors that take them; a constructor is its section's
# schema. If the section's key `name` chooses among several constructors, they are given by name, the default first.
Sections = Mapping[str, Constructor | Mapping[str, Constructor]]


def check_options(constructor: Constructor, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks and converts a constructor's options, and adds the defaults of its other keyword arguments.

    Raises:
        InputError: the constructor does not take an option, or an option has another type; `where` is the section's
            name, for the message.
    """
    schema = _as_dataclass(constructor)
    known = [f.name for f in fields(schema)]
    for key in options:
        if key not in known and (key in inspect.signature(constructor).parameters or not takes_more(constructor)):
            raise InputError(no_such_key(f"{where}.{key}", [f"{where}.{k}" for k in known]))
    typed = merge(OmegaConf.structured(schema), {k: v for k, v in options.items() if k in known}, f"{where}.")
    if is_dataclass(constructor):  # which checks and converts more than OmegaConf does
        return asdict(typing.cast(Any, OmegaConf.to_object(typed)))
    return {**options, **plain(typed)}


def complete_options(sections: Sections, key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Checks and converts the options of a section and of the sections inside it, and adds the defaults.

    It does not check ranges; the constructors do.

    Args:
        sections: the configuration's sections, which include this one and those inside it.
        key: the section, as in `model`; `model.quantizer` is inside it.
        options: the given options, with `name` if the section has a choice of constructors.

    Raises:
        InputError: as in `check_options`; or no constructor has this name.
    """
    schema = sections[key]
    if isinstance(schema, Mapping):
        name = options.get("name", next(iter(schema)))
        options = {option: value for option, value in options.items() if option != "name"}
        with section(key):
            require_choice("name", name, schema, key.rpartition(".")[2])
            require_options(schema[name], name, options)
        complete = {"name": name, **check_options(schema[name], options, key)}
    else:
        complete = check_options(schema, options, key)
    for option, value in complete.items():
        if f"{key}.{option}" in sections:
            complete[option] = complete_options(sections, f"{key}.{option}", value or {})
    return complete


def settings(
    schema: Constructor, sections: Sections, prefix: str = "", instance: Any = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, meaning) of every setting of a configuration, including its sections.

    The defaults come from the instance if there is one, because a configuration may have its own defaults for a part.
    """
    meanings = _meanings(schema)
    defaults = instance or _as_dataclass(schema)()
    for f in fields(_as_dataclass(schema)):
        # A field cannot be called `from`, so it has an underscore, but the key has none.
        key, default = prefix + f.name.removesuffix("_"), getattr(defaults, f.name)
        nested = f.type if is_dataclass(f.type) else sections.get(key)
        if isinstance(nested, Mapping):
            yield f"{key}.name", "str", next(iter(nested)), f"{meanings[f.name]}: {', '.join(nested)}"
            takers: dict[tuple[str, str, str, str], list[str]] = {}  # a setting, and the constructors that share it
            for name, constructor in nested.items():
                for setting in settings(constructor, sections, key + "."):
                    takers.setdefault(setting, []).append(name)
            for (inner, kind, text, meaning), names in takers.items():
                some = len(names) < len(nested) and not meaning.startswith("(")
                yield inner, kind, text, f"({', '.join(names)}) {meaning}" if some else meaning
        elif nested is not None:
            own = default if is_dataclass(default) else None
            yield from settings(typing.cast(Constructor, nested), sections, key + ".", own)
        else:
            kind = f.type.__name__ if isinstance(f.type, type) and not typing.get_args(f.type) else str(f.type)
            kind = f.metadata.get("type", kind)  # a setting of several types checks them itself
            text = "null" if default is None else str(default)
            yield key, kind.replace("None", "null").replace("typing.", ""), text, meanings.get(f.name, "")


def usage(synopsis: str, cls: type, sections: Sections) -> str:
    """The text of --help: the form of the command line, and every key with its default and meaning."""
    lines = [f"usage: {synopsis}", "", (inspect.getdoc(cls) or "").strip(), ""]
    shown: dict[tuple[str, ...], str] = {}
    for key, kind, default, meaning in settings(cls, sections):
        section, _, name = key.rpartition(".")
        if section.startswith(shown.setdefault((name, kind, default, meaning), section) + "."):
            continue  # an outer section has the same setting
        lines.append(f"  {key}={default}  ({kind})")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def takes_more(constructor: Constructor) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values())


def merge(config: DictConfig, layer: Mapping[str, Any], prefix: str = "") -> DictConfig:
    _check_values(layer, prefix)  # comes first, because OmegaConf tries to convert integers of any length to floats
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(config, layer))
        _check_values(plain(merged), prefix)
        return merged
    except OmegaConfBaseException as error:
        raise InputError(f"{prefix}{error.full_key}: {first_line(error)}; see --help for what it takes") from error


def _check_values(values: Mapping[str, Any], prefix: str) -> None:
    """Refuses values that no setting takes."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _check_values(value, f"{key}.")
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float):
                require(abs(v) <= 1e30, f"{key}={v}: must be a finite number, of 1e30 at most")
            elif isinstance(v, int):
                require(abs(v) < 2**63, f"{key}={str(v)[:50]}: must be below 2^63")
            elif isinstance(v, str):
                require(bool(v.strip()), f"{key} is empty; give it a value, or leave it out")
                lines = any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in v)
                require(not lines, f"{key}={v!r}: holds a line break or another control character; leave it out")
                pattern = any(character in v for character in "{*?[")  # a pattern may stand for many files
                longest = len(os.fsencode(v)) if pattern else max(len(os.fsencode(part)) for part in v.split("/"))
                require(longest <= (4095 if pattern else 255), f"{key}={v[:50]}...: is too long for a name or a path")


def no_such_key(key: str, known: Sequence[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    elsewhere = sorted((k for k in known if k.rsplit(".", 1)[-1] == last), key=lambda k: k.count("."))
    near = difflib.get_close_matches(key, known, 1, 0.9) or elsewhere or difflib.get_close_matches(key, known, 1, 0.5)
    return f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else "see --help for all of them")


def _as_dataclass(constructor: Constructor) -> type:
    """A dataclass with the constructor's keyword arguments (those with a default), for OmegaConf's checks."""
    if is_dataclass(constructor):
        return typing.cast(type, constructor)
    members = []
    for p in inspect.signature(constructor).parameters.values():
        if p.default is not p.empty:
            value = list(p.default) if isinstance(p.default, tuple) else p.default
            kind = list[typing.get_args(p.annotation)[0]] if isinstance(p.default, tuple) else p.annotation  # type: ignore[misc]
            members.append((p.name, kind, field(default_factory=functools.partial(copy.copy, value))))
    return make_dataclass(getattr(constructor, "__name__", "Options"), members)


@functools.cache
def _meanings(schema: Constructor) -> dict[str, str]:
    """The meaning of each setting: the string below a dataclass's field, or the entry in a constructor's `Args:`."""
    meanings: dict[str, str] = {}
    if is_dataclass(schema):
        for ancestor in filter(is_dataclass, reversed(inspect.getmro(typing.cast(type, schema)))):
            body = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body[0]
            statements = typing.cast(ast.ClassDef, body).body
            for statement, following in itertools.pairwise(statements):
                if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                    name = typing.cast(ast.Name, statement.target).id
                    meanings[name] = " ".join(str(ast.literal_eval(following.value)).split())
        return meanings
    for described in reversed(inspect.getmro(schema)) if inspect.isclass(schema) else [schema]:
        arguments = inspect.cleandoc(described.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        name = ""
        for line in textwrap.dedent(arguments).splitlines():
            if not line.startswith(" "):
                name, _, line = line.partition(":")
                meanings[name] = ""
            meanings[name] = f"{meanings[name]} {line.strip()}".strip()
    return meanings


def plain(config: Any) -> Any:
    if not OmegaConf.is_config(config):
        return config
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
