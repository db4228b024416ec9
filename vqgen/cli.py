"""The frame around every program: --help, the configuration, and one line for what the user can put right."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from vqgen.config import Sections, load_config, usage
from vqgen.errors import InputError
from vqgen.launch import make_up_for_launcher


def run_program(
    main: Callable[..., None], cls: type, sections: Sections, synopsis: str, num_positional: int = 0
) -> None:
    """Calls main(*positional, config) with what the command line says.

    Args:
        main: the program; it takes the positional arguments and a configuration.
        cls: the configuration's class.
        sections: its plain-dict sections, and the constructors they go to.
        synopsis: how to call the program, for --help.
        num_positional: how many arguments come before the configuration.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Two of DDP's: an option that Accelerate calls by its old name, and the layout of 1x1 convolutions' gradients.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if "transformers" in sys.modules:  # its bars for files of one part say nothing
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(usage(synopsis, cls, sections))
        return
    try:
        positional, rest = arguments[:num_positional], arguments[num_positional:]
        if len(positional) < num_positional or any("=" in argument for argument in positional):
            raise InputError(f"usage: {synopsis}")
        config: Any = load_config(cls, rest, sections)
        make_up_for_launcher()
        main(*positional, config)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(5)  # what all processes find, the main one says first, and the launcher then ends the others
        # A DataLoader's worker wraps the message in its traceback; the last line is the message.
        line = str(error).strip().splitlines()[-1].removeprefix("vqgen.errors.InputError: ")
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
