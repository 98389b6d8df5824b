"""The ``distckpt`` command: one width for its rooms. Importing it, and asking it for help, imports no torch."""

WIDTH = 88  # columns of everything that the command prints
