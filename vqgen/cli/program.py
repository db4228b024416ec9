"""The frame around every program: --help, the configuration, and one line for what the user can put right."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

from vqgen.cli.launch import make_up_for_launcher
from vqgen.cli.parse import load_config
from vqgen.cli.reflect import Sections, usage
from vqgen.errors import InputError
from vqgen.training.stop import end_with_launcher, end_workers, explained


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
        run_dir: whether the program takes a run's folder before its settings; one that is not given is None.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Two of DDP's: an option that Accelerate calls by its old name, and the layout of 1x1 convolutions' gradients.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if "transformers" in sys.modules:  # its bars for files of one part say nothing
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    end_with_launcher()
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(usage(synopsis, cls, sections))
        return
    config: Any = None
    code: Any = 0
    try:
        arguments = _settings_from_flags(arguments)
        positional: list[str | None] = []
        if run_dir != "none":
            words = [argument for argument in arguments if "=" not in argument]
            if len(words) > 1 or (not words and run_dir == "required"):
                raise InputError(f"usage: {synopsis}")
            arguments = [argument for argument in arguments if "=" in argument]
            positional = [words[0] if words else None]
        config = load_config(cls, arguments, sections)
        make_up_for_launcher()
        main(*positional, config)
    except InputError as error:
        # A DataLoader's worker wraps the message in its traceback; the last line is the message.
        code = _fail(str(error).strip().splitlines()[-1].removeprefix("vqgen.errors.InputError: "), 2)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        end_workers()  # first, as the end of another of them would raise here too
        line = explained(error, config)
        if line is None:
            raise
        code = _fail(line, 1)
    finally:
        end_workers()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is done and closed, but gloo's threads may outlive the interpreter, which then aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _fail(line: str, code: int) -> int:
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)  # what all processes find, the main one says first, and the launcher then ends the others
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _settings_from_flags(arguments: list[str]) -> list[str]:
    """The command line with `--key value` and `--key=value` written as key=value."""
    settings, words = [], iter(arguments)
    for word in words:
        if word.startswith("--"):
            value = None if "=" in word else next(words, "")
            if value == "":
                raise InputError(f"{word} has no value; write {word} VALUE")
            word = word.removeprefix("--") + (f"={value}" if value else "")
        settings.append(word)
    return settings
