"""The frame of every program: --help, the configuration, and one line for each error that the user can correct."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vqgen.cli.launch import make_up_for_launcher
from vqgen.cli.parse import expand_home, is_setting, load_config
from vqgen.cli.reflect import Sections, usage
from vqgen.distributed import free_group
from vqgen.errors import InputError
from vqgen.training.stop import (
    dropping_unread_output,
    end_with_launcher,
    end_workers,
    explained,
    is_launched,
    output_is_unread,
)


def run_program(
    main: Callable[..., None],
    cls: type,
    sections: Sections,
    synopsis: str,
    run_dir: Literal["none", "optional", "required"] = "none",
    paths: Sequence[str] = (),
) -> None:
    """Reads the command line, and calls main(config), main(run_dir, config) or main(*paths, config).

    Args:
        main: the program.
        cls: the configuration's class.
        sections: the configuration's plain-dict sections, with the constructors that take them.
        synopsis: the form of the command line, for --help.
        run_dir: whether the program takes a run's folder before its settings; main gets None if the user gives none.
        paths: names of the paths that the program takes instead, all of them.
    """
    with dropping_unread_output():
        _set_up_messages()
        end_with_launcher()
        code = _run(main, cls, sections, synopsis, run_dir, paths)
        sys.stdout.flush()
        sys.stderr.flush()
        if output_is_unread():
            code = _code_of_unread_output(code)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        free_group()
        os._exit(code)  # everything is closed; a normal exit may abort, because gloo's threads are still running
    if code:
        sys.exit(code)


def _run(
    main: Callable[..., None], cls: type, sections: Sections, synopsis: str, run_dir: str, paths: Sequence[str]
) -> Any:
    """Runs the program; returns its exit code."""
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(usage(synopsis, cls, sections))
        return 0
    config: Any = None
    try:
        arguments = _joined_flags(sys.argv[1:])
        positional: list[str | None] = []
        if run_dir != "none" or paths:
            names = paths or ["RUN_DIR"]
            words = [argument for argument in arguments if not is_setting(argument)]
            if len(words) != len(names) and (words or run_dir != "optional"):
                raise InputError(f"usage: {synopsis}")
            arguments = [argument for argument in arguments if is_setting(argument)]
            positional = [expand_home(word, name) for word, name in zip(words, names, strict=True)] if words else [None]
        config = load_config(cls, arguments, sections)
        make_up_for_launcher()
        main(*positional, config)
    except InputError as error:
        # A DataLoader's worker puts its traceback before the message, which is the last line.
        return _fail(str(error).strip().splitlines()[-1].removeprefix("vqgen.errors.InputError: "), 2)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code or 0
    except Exception as error:
        end_workers()  # first, because another worker's end would raise here too
        line = explained(error, config)
        if line is None:
            raise
        return _fail(line, 1)
    finally:
        end_workers()
    return 0


def _set_up_messages() -> None:
    """Chooses which of the libraries' messages the programs show; importing vqgen alone changes none of them."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Two warnings of DDP: Accelerate uses an option's old name, and gradients of 1x1 convolutions have another layout.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Pillow's warnings about odd files help only the makers of the files. Files that it cannot read raise an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    if "transformers" in sys.modules:  # its progress bars are useless for models of one file
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _code_of_unread_output(code: Any) -> Any:
    """The exit code after the reader of the output has ended: that of a process that SIGPIPE killed.

    It is 0 under a launcher, which would print a traceback for any other code.
    """
    if code:
        return code
    return 0 if is_launched() else 128 + signal.SIGPIPE


def _fail(line: str, code: int) -> int:
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # all processes fail alike: the main one prints the line, and the launcher then ends the others
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _joined_flags(arguments: list[str]) -> list[str]:
    """The command line with each `--key value` joined to `--key=value`."""
    joined, words = [], iter(arguments)
    for word in words:
        if word.startswith("--"):
            word = word if "=" in word else f"{word}={next(words, '')}"
            if word.endswith("=") and word.count("=") == 1:
                raise InputError(f"{word[:-1]} has no value; write {word[:-1]} VALUE")
        joined.append(word)
    return joined
