"""The ``distckpt`` command. Importing it, and asking it for help, imports no torch."""
