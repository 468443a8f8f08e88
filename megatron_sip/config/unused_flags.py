"""Flags that would do nothing beside others are refused, not passed over."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from megatron_sip.errors import DataError


def refuse_unused(
    args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None], names: Iterable[str], beside: str
) -> None:
    """Raises DataError where one of these flags, which would do nothing, is not at its default in the parser of `add`."""
    parser = argparse.ArgumentParser()
    add(parser)
    places = {name: name.removeprefix("--").replace("-", "_") for name in names}
    given = [name for name, place in places.items() if getattr(args, place) != parser.get_default(place)]
    if given:
        raise DataError(f"{', '.join(given)}: of no effect {beside}: leave {'it' if len(given) == 1 else 'them'} out")
