"""The common frame of all programs: the command line, --help, messages, and the start of several processes."""
