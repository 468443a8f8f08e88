"""The errors that a user can mend. Each names the file, flag or value, what is wrong with it and what would be right."""

from __future__ import annotations


class UserError(Exception):
    """What the user can mend: a command ends with its message alone, without a traceback. Each room derives its own."""


class ArgumentError(SystemExit):
    """Flags that cannot work, or not together: ends the process with its message, which names the flag and the mend."""


class DataError(UserError, ValueError):
    """A source, a checkpoint or a recorded file that cannot be used: the message names the file (and line)."""
