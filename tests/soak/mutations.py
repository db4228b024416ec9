"""Makes faulty configuration files, and checks that the training programs report each fault in one line.

python tests/soak/mutations.py FOLDER [COUNT [SEED]]

A mutated file either runs, or gets one line `error: ...` and exit code 2 and leaves nothing behind. A run that finds
too little memory after its start may leave files behind.
"""

import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from vqgen.adversarial.dcgan import DCGANDiscriminator, DCGANGenerator
from vqgen.adversarial.discriminators import PatchDiscriminator
from vqgen.cli.reflect import settings
from vqgen.priors.prior import Prior
from vqgen.quantizers import BASES, QUANTIZERS
from vqgen.settings import DataConfig, GANConfig, Stage1Config, Stage2Config
from vqgen.tokenizers import ARCHITECTURES

ROOT = Path(__file__).parents[2]
STAGE1 = {
    "model": ARCHITECTURES,
    "model.quantizer": QUANTIZERS,
    "model.quantizer.base": BASES,
    "discriminator": PatchDiscriminator,
}
PROGRAMS: dict[str, tuple[type, dict[str, Any], str]] = {  # configuration, sections, and the shipped files
    "stage1/train.py": (Stage1Config, STAGE1, "configs/stage1/*.yaml configs/debug/stage1.yaml"),
    "stage1/train_gan.py": (
        GANConfig,
        {"generator": DCGANGenerator, "discriminator": DCGANDiscriminator},
        "configs/gan/*.yaml configs/debug/gan.yaml",
    ),
    "stage2/train.py": (
        Stage2Config,
        {"model": Prior, "data": DataConfig},
        "configs/stage2/*.yaml configs/debug/stage2.yaml",
    ),
}
TINY = {
    "run_dir": "run",
    "data.source": "digits",
    "data.image_size": 32,
    "train.max_steps": 2,
    "train.max_seconds": 2.0,  # a mutation may set many steps
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.eval_images": 16,
    "tracking.wandb": "disabled",
}
SMALL = {
    "stage1/train.py": {"model.widths": [8, 16]},
    "stage1/train_gan.py": {"generator.width": 4, "discriminator.width": 4},
    "stage2/train.py": {"stage1": "../stage1", "model.hidden_size": 16, "model.num_hidden_layers": 1},
}
MEMORY = 6 << 30
NO_MEMORY = "error: memory is full: "  # allowed for sizes that are valid, but too large here
SECONDS = 60

HUGE = 10**9
NUMBERS = [-HUGE, -3, -1, -0.5, -1e-9, 0, 0.0, 1e-300, 1e-9, 0.5, 1, 1.0, 1.5, 2, 3, 5, 7.0, 100, 10**6, HUGE, 2**31]
NUMBERS += [
    4,
    8,
    16,
    64,
    0.1,
    0.9,
    2**63,
    2**64,
    10**30,
    10**400,
    1e38,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS = ["", " ", "x", "digits", "none", "null", "nan", "1e-3", "1_000", "0x10", "1:30", "2026-01-01", "=", "a=b", "-"]
TEXTS += [
    "ünïcödé 图像",
    "\U0001f600",
    "a\0b",
    "a\nb",
    "a/b",
    "x" * 300,
    "x" * 5000,
    "/dev/null/x",
    "config.yaml",
    "%s",
]
TEXTS += ["???", "${nope}", "${train.max_steps}", "${oc.env:HOME}", "${oc.env:NOPE_NOPE}", "${oc.env:NOPE_NOPE,3}"]
TEXTS += ["${run_dir}", "${", "a${b", "${oc.decode:'['}", "${nope:1}", "{}", "[1,2]", "#12", "#336699", "transparent"]
TEXTS += [
    "hsl(0,100%,50%)",
    "*.tar",
    "{0..3}.tar",
    "{0..999999999}.tar",
    "[.tar",
    "digits.npz",
    "ema",
    "cosine",
    "gpt2",
]
OTHERS = [None, True, False, [], {}, [1], [0], [-1, 2], ["a"], [None], [[1]], [8, 16.5], [8, True], [8, float("nan")]]
OTHERS += [[4] * 40, [HUGE, HUGE], [8] * 6, {"a": 1}, {1: 2}, {None: None}, {"name": "vq"}, {"name": ["vq"]}, {"": 1}]
OTHERS += [{"a": {"b": {"c": [1, {"d": 2}]}}}, [{"a": 1}]]
KEYS = [
    "",
    "x",
    "lr",
    "a.b",
    "optim.lr",
    "train.max_steps",
    "name",
    "self",
    "base",
    "options",
    "layout",
    "é",
    "x" * 300,
]
KEYS += [0, 1.5, None, True, -1, "<<", "${nope}", "???", "a[0]", "[0]", " lr", "lr ", "__class__", "keys", "_target_"]
RAW = ["!!python/object:os.system ls", "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!x y", "*a"]
RAW += ["!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2026-01-01", "2026-01-01", "0o17", "017"]
RAW += ["!!int x", "!!float x", "!!float 1", "!!bool 3", "!!null x", "!!str 1", "|\n  text\n", ">", "&a [*a]", "'", '"']
RAW += [
    "9" * 5000,
    "1e999",
    "-.inf",
    ".nan",
    ".NaN",
    "1e-999",
    "? a",
    "[" * 2000,
    "{a: " * 200,
    "- 1",
    "a: b",
    "@",
    "`",
]
RAW += [
    "{a: 1, a: 2}",
    "{<<: {a: 1}}",
    "{<<: 1}",
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "~",
    "yes",
    "off",
    "12:30:45",
    "\t1",
    "1_0",
]


class _Raw(str):
    """Text that goes to the file unchanged."""


yaml.SafeDumper.add_representer(_Raw, lambda dumper, raw: dumper.represent_str(f"RAW{raw.encode().hex()}RAW"))


def mutated_configs(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yields (program, YAML text); bytes that are not UTF-8 are escaped in the text as by `surrogateescape`."""
    draw = random.Random(seed)
    for i in range(count):
        program = [*PROGRAMS][i % len(PROGRAMS)]
        config = _starting_point(program, draw)
        mutations = draw.choices([_value, _key, _section, _text], [12, 3, 2, 3], k=draw.choice([1, 1, 1, 2]))
        for mutate in mutations:
            if mutate is not _text:
                mutate(config, draw)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=10**6)
        text = re.sub("RAW([0-9a-f]*)RAW", lambda raw: bytes.fromhex(raw[1]).decode(), text)
        yield program, _text(text, draw) if _text in mutations else text


def _starting_point(program: str, draw: random.Random) -> dict[str, Any]:
    """A shipped file, or a file with every setting; both with tiny settings."""
    cls, sections, patterns = PROGRAMS[program]
    files = [path for pattern in patterns.split() for path in sorted(ROOT.glob(pattern))]
    path = draw.choice([*files, None, None])
    config: dict[str, Any] = {}
    if path is not None:
        config = yaml.safe_load(path.read_text())
    else:
        if program == "stage1/train.py":
            name, base = draw.choice([*QUANTIZERS]), draw.choice([*BASES])
            sections = {**sections, "model.quantizer": QUANTIZERS[name], "model.quantizer.base": BASES[base]}
            _put(config, "model.quantizer.name", name)
            if name == "residual":
                _put(config, "model.quantizer.base.name", base)
        for key, _, default, _ in settings(cls, sections):
            _put(config, key, yaml.safe_load(default.replace("(", "[").replace(")", "]")))
    for key, value in {**TINY, **SMALL[program]}.items():
        _put(config, key, value)
    config.get("data", {}).pop("val_source", None)
    return config


def _value(config: dict[str, Any], draw: random.Random) -> None:
    """Another value, a value of another type, or a value without meaning."""
    key = draw.choice(_paths(config))
    alike = [number for number in NUMBERS if type(number) is type(_get(config, key))]
    values = draw.choices([alike or NUMBERS, NUMBERS, TEXTS, OTHERS, RAW], [6, 3, 3, 3, 2])[0]
    value = draw.choice(values)
    _put(config, key, _Raw(value) if values is RAW else value)


def _key(config: dict[str, Any], draw: random.Random) -> None:
    """A key that is missing, mistyped, repeated in another section, or unknown."""
    *parents, last = draw.choice(_paths(config))
    section = _get(config, parents)
    kind = draw.choice(["missing", "mistyped", "elsewhere", "extra", "extra"])
    if kind == "missing":
        del section[last]
    elif kind == "mistyped":
        cut = draw.randrange(len(str(last)) + 1)
        section[str(last)[:cut] + draw.choice(["", "x", last.upper()]) + str(last)[cut + 1 :]] = section.pop(last)
    elif kind == "elsewhere":
        _get(config, draw.choice(_paths(config))[:-1])[last] = section.pop(last)
    else:
        section[draw.choice(KEYS)] = draw.choice([*NUMBERS, *TEXTS, *OTHERS])


def _section(config: dict[str, Any], draw: random.Random) -> None:
    """A section where a value was, a value where a section was, or one section in place of another."""
    sections = [path for path in _paths(config, True) if isinstance(_get(config, path), dict)]
    path, other = draw.choice(sections), draw.choice(_paths(config, True))
    kind = draw.choice(["flat", "deep", "moved", "nested"])
    if kind == "flat":
        _put(config, path, draw.choice([*NUMBERS, *TEXTS, *OTHERS]))
    elif kind == "deep":
        _put(config, other, {draw.choice(KEYS): {draw.choice(KEYS): draw.choice(NUMBERS)}})
    elif kind == "moved":
        _put(config, other, yaml.safe_load(yaml.safe_dump(_get(config, path))))
    else:
        value = _get(config, path)
        _put(config, path, {path[-1]: value})


def _text(text: str, draw: random.Random) -> str:
    """YAML that is broken, or unusual."""
    lines = text.splitlines(keepends=True)
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    at, to = sorted(draw.randrange(len(text) + 1) for _ in "ab")
    bytes_ = "".join(draw.choice("\udcff\udc80\udcc3\udce2\x00\x07\x1b\x7f\u2028\ufeff") for _ in range(3))
    ways: list[Callable[[], str]] = [
        lambda: "",
        lambda: draw.choice(
            ["# only a comment\n", "---\n", "...\n", "null\n", "5\n", "text\n", "- 1\n- 2\n", "[]", "{}"]
        ),
        lambda: text[:at],
        lambda: text[:at] + text[to:],
        lambda: text[:at] + draw.choice("[]{}:,&*!|>'\"%@`#-?\t \n\r") + text[at:],
        lambda: text[:at] + bytes_ + text[at:],
        lambda: "\ufeff" + text,
        lambda: text.replace("\n", "\r\n"),
        lambda: text.replace("\n", "\r"),
        lambda: text.replace("  ", "\t"),
        lambda: text.replace("  ", " "),
        lambda: text.replace("  ", ""),
        lambda: text.replace(": ", ":"),
        lambda: text.replace(":", "="),
        lambda: text + text,
        lambda: text + "---\n" + text,
        lambda: "---\n" + text + "...\n",
        lambda: "%YAML 1.2\n---\n" + text,
        lambda: "".join([*lines[:i], lines[i], *lines[i:]]),
        lambda: "".join(lines[:i] + lines[i + 1 :]),
        lambda: "".join([*lines[:i], lines[j], *lines[i:]]),
        lambda: "".join([*lines[:i], lines[i].rstrip("\n").partition(":")[0] + ":\n", *lines[i + 1 :]]),
        lambda: "".join([*lines[:i], " " + lines[i], *lines[i + 1 :]]),
        lambda: "base: &a {seed: 1}\n<<: *a\n" + text,
        lambda: "<<: {seed: 1}\n" + text,
        lambda: "<<: [{seed: 1}, {run_dir: other}]\n" + text,
        lambda: "a: &a [1]\nb: *a\n" + text,
        lambda: "a: &a\n  b: *a\n" + text,
        lambda: text + "? [1, 2]\n: 3\n",
        lambda: text + "train.max_steps: 1\n",
        lambda: text.encode("utf-16").decode("latin-1"),
        lambda: text.encode("utf-16").decode("utf-8", "surrogateescape"),
        lambda: text + "x: " * 50 + "1\n",
        lambda: text + "x: " + "[" * 5000 + "]" * 5000 + "\n",
        lambda: text + "#" + "x" * 100_000 + "\n",
        lambda: "[" + text + "]",
        lambda: "{" + ", ".join(line.strip() for line in lines) + "}",
    ]
    return draw.choice(ways)()


def _paths(config: dict[Any, Any], sections: bool = False) -> list[tuple[Any, ...]]:
    """The key of every value, as a tuple of its parts; on request, of every section too."""
    found: list[tuple[Any, ...]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found += [(key,)] * sections + [(key, *inner) for inner in _paths(value, sections)]
        else:
            found.append((key,))
    return found


def _get(config: dict[Any, Any], path: Any) -> Any:
    for part in path:
        config = config[part]
    return config


def _put(config: dict[Any, Any], path: Any, value: Any) -> None:
    *parents, last = path.split(".") if isinstance(path, str) else path
    for part in parents:
        if not isinstance(config.get(part), dict):
            config[part] = {}
        config = config[part]
    config[last] = value


# Running them


def run_mutations(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs this number of mutations, prints those that fail, and returns the number of each outcome."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"NETRC": os.devnull, "PYTHONFAULTHANDLER": "1"}  # hides wandb's key
    os.environ.pop("WANDB_API_KEY", None)
    for program in PROGRAMS:
        runpy.run_path(str(ROOT / program))  # does all imports once
    if not (folder / "stage1").exists():
        debug = [str(ROOT / "configs/debug/stage1.yaml"), f"run_dir={folder}/stage1", "tracking.wandb=disabled"]
        code, output, errors = _run("stage1/train.py", debug, folder)
        assert code == 0, output + errors
    work = folder / "work"
    outcome: dict[str, Any] = {"valid runs": 0, "clear errors": 0, "tracebacks": 0, "failures": []}
    for program, text in mutated_configs(seed, count):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
        code, output, errors = _run(program, ["config.yaml", *_overrides(program, text)], work)
        one_line = errors.startswith("error: ") and errors.count("\n") == 1
        left = sorted(path.name for path in work.iterdir() if path.name != "config.yaml")
        if code == 0 and "Traceback" not in output + errors:
            outcome["valid runs"] += 1
            continue
        if one_line and ((code == 2 and not left) or (code == 1 and errors.startswith(NO_MEMORY))):
            outcome["clear errors"] += 1
            continue
        outcome["tracebacks"] += "Traceback" in output + errors
        said = f"exit code {code}; left behind: {left}\n{output[-1000:]}{errors[-4000:]}"
        outcome["failures"].append((program, text, said))
        print(f"--- {program}\n{text[:1500]}\n{said}", flush=True)
    return outcome


def _overrides(program: str, text: str) -> list[str]:
    """Settings that keep the run tiny, without those that the file has, because they may be mutated."""
    try:
        config = yaml.safe_load(text)
    except Exception:  # the program must report any YAML error itself
        return []
    given = []
    for key, value in {**TINY, **SMALL[program]}.items():
        try:
            _get(config, key.split("."))
        except (KeyError, TypeError, AttributeError, IndexError):
            given.append(f"{key}={value}".replace(" ", ""))
    return given


def _run(program: str, arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    """Runs a program in a copy of this process, which has all imports; returns exit code, output, errors.

    The copy may crash, hang or ask for all memory without harm.
    """
    out, err = cwd.parent / "out", cwd.parent / "err"
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(SECONDS)  # ends the copy at any point
            os.chdir(cwd)
            sys.argv = [program, *arguments]
            runpy.run_path(str(ROOT / program), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, *(path.read_text(errors="replace") for path in (out, err))


if __name__ == "__main__":
    outcome = run_mutations(*(int(n) for n in [*sys.argv[2:], "200", "0"][:2]), Path(sys.argv[1]))
    print({name: n for name, n in outcome.items() if name != "failures"}, "failures:", len(outcome["failures"]))
    sys.exit(bool(outcome["failures"]))
