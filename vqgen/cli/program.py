"""The frame around every program: --help, the configuration, and one line for what the user can put right."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

from vqgen.cli.launch import make_up_for_launcher
from vqgen.cli.parse import expand_home, is_setting, load_config
from vqgen.cli.reflect import Sections, usage
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
) -> None:
    """Calls main(config), or main(run_dir, config), with what the command line says.

    Args:
        main: the program.
        cls: the configuration's class.
        sections: its plain-dict sections, and the constructors they go to.
        synopsis: how to call the program, for --help.
        run_dir: whether the program takes a run's folder before its settings; if the user gives none, main gets None.
    """
    with dropping_unread_output():
        _set_up_messages()
        end_with_launcher()
        code = _run(main, cls, sections, synopsis, run_dir)
        sys.stdout.flush()
        sys.stderr.flush()
        if output_is_unread():
            code = _code_of_unread_output(code)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # everything is closed, but gloo's threads may outlive the interpreter, which then aborts
    if code:
        sys.exit(code)


def _run(main: Callable[..., None], cls: type, sections: Sections, synopsis: str, run_dir: str) -> Any:
    """Runs the program; returns its exit code."""
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(usage(synopsis, cls, sections))
        return 0
    config: Any = None
    try:
        arguments = _joined_flags(sys.argv[1:])
        positional: list[str | None] = []
        if run_dir != "none":
            words = [argument for argument in arguments if not is_setting(argument)]
            if len(words) > 1 or (not words and run_dir == "required"):
                raise InputError(f"usage: {synopsis}")
            arguments = [argument for argument in arguments if is_setting(argument)]
            positional = [expand_home(words[0], "RUN_DIR") if words else None]
        config = load_config(cls, arguments, sections)
        make_up_for_launcher()
        main(*positional, config)
    except InputError as error:
        # A DataLoader's worker wraps the message in its traceback; the last line is the message.
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
    """Chooses what a program shows of its libraries' messages; a program that only imports vqgen chooses itself."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Two of DDP's: an option that Accelerate calls by its old name, and the layout of 1x1 convolutions' gradients.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Pillow's warnings about odd files help only those who made the files. It raises an error for what it cannot read.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    if "transformers" in sys.modules:  # its progress bars for models of one file say nothing
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _code_of_unread_output(code: Any) -> Any:
    """The exit code where the reader of the output has ended: as of a process that SIGPIPE killed.

    A launcher would answer any code but 0 with a traceback of its own.
    """
    if code:
        return code
    return 0 if is_launched() else 128 + signal.SIGPIPE


def _fail(line: str, code: int) -> int:
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # all processes find the same: the main one says it first, and the launcher then ends the others
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
