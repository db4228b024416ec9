"""The frame around the programs: the command line, --help, messages, and the processes that a launcher starts."""
