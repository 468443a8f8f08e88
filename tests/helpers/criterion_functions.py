"""Functions that a test names as criteria; the text tells some of them what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

NOT_A_FUNCTION = 1


def quality(texts: Sequence[str], prefix: str, reference: str) -> list[float | None]:
    """The number after q=; None without one."""
    return [float(text.split("q=")[1].split()[0]) if "q=" in text else None for text in texts]


def known(texts: Sequence[str], prefix: str, reference: str) -> list[float]:
    """Which texts are the reference, behind this prefix."""
    return [float(text == reference and prefix.startswith("Document")) for text in texts]


def obeys(texts: Sequence[str], prefix: str, reference: str) -> Any:
    """Does what the first text says."""
    order = texts[0].split()[-1]
    if order == "hang":
        time.sleep(3600)
    if order == "slowly":
        time.sleep(0.15)
    if order == "raise":
        raise RuntimeError("as told")
    if order == "crash":
        os._exit(3)
    answers = {
        "nothing": None,
        "short": [0.5] * (len(texts) - 1),
        "words": ["good"] * len(texts),
        "large": [1.5] * len(texts),
        "nan": [float("nan")] * len(texts),
    }
    return answers.get(order, [0.25] * len(texts))


class Model:
    @staticmethod
    def score(texts: Sequence[str], prefix: str, reference: str) -> list[float]:
        return [1.0] * len(texts)
