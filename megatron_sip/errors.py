"""The one exception of the data room: bad input, described so that the reader can mend it."""

from __future__ import annotations


class DataError(ValueError):
    """A source that cannot be used: the message names the file (and line), what is wrong and what would be right."""
