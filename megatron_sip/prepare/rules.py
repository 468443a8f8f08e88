"""Suffixes spoilt by rules, for training judges without a large teacher.

Each rule gives another text, or None where the text leaves it nothing to change: never the text itself, white space aside.
What is drawn depends on the seed alone. A word is a run of characters between white space; of scripts that are written without
spaces (Chinese, Japanese, Thai, ...) it is one character with its marks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import cycle
from random import Random

Rule = Callable[[str, str, Random], str | None]
"""(text, what stands before it, draws) -> the spoilt text."""

_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
_PIECE = re.compile(rf"\s+|[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SENTENCE = re.compile(r".+?(?:(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s|$)|[。！？｡؟।]+[」』”’]*|(?=\n)|$)", re.DOTALL)
_NUMBER = re.compile(r"\d+")
_NAME_WORD = re.compile(r"[^\W\d_][\w’'-]*")
_SENTENCE_ENDS = ".!?:;\"'“”‘’«»(*#>-–—"
_LOOP_WORDS = (3, 8)
"""Shortest and longest phrase that `repeat` repeats."""
_TRIES = 8


def shuffle(text: str, prefix: str, draws: Random) -> str | None:
    """The words in another order; white space stays where it is."""
    pieces = pieces_of(text)
    places = [i for i, piece in enumerate(pieces) if not piece.isspace()]
    words = [pieces[i] for i in places]
    if (mixed := _reordered(words, draws)) is None:
        return None
    for place, word in zip(places, mixed, strict=True):
        pieces[place] = word
    return "".join(pieces)


def swap_sentences(text: str, prefix: str, draws: Random) -> str | None:
    """Two different sentences in each other's place."""
    found = [match for match in _SENTENCE.finditer(text) if match[0].strip()]
    spans = [(m.start() + len(m[0]) - len(m[0].lstrip()), m.start() + len(m[0].rstrip())) for m in found]
    if len({text[a:b] for a, b in spans}) < 2:
        return None
    one = draws.choice(spans)
    others = [span for span in spans if text[slice(*span)] != text[slice(*one)]]
    (a, b), (c, d) = sorted((one, draws.choice(others)))
    return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def swap_entities(text: str, prefix: str, draws: Random) -> str | None:
    """Each name replaced by another of the text, everywhere; one that is alone by a name from before the text.

    A name is a run of capitalised words inside a sentence: scripts without capitals have none.
    """
    names = names_in(text)
    if len(names) == 1:
        others = [name for name in names_in(prefix) if name not in names]
        others = [name for name in others if name.casefold() != names[0].casefold()]
        if not others:
            return None
        into = {names[0]: draws.choice(others)}
    elif names:
        draws.shuffle(names)
        into = dict(zip(names, [*names[1:], names[0]], strict=True))
    else:
        return None
    longest_first = sorted(into, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(pattern, lambda match: into[match[0]], text)


def numbers(text: str, prefix: str, draws: Random) -> str | None:
    """Each number another of as many digits, the same one everywhere."""
    into: dict[str, str] = {}
    return _NUMBER.sub(lambda match: into.setdefault(match[0], _other_number(match[0], draws)), text) or None


def repeat(text: str, prefix: str, draws: Random) -> str | None:
    """From some place on one phrase again and again, as a model that has got stuck; as many words as before, and white space
    stays where it is."""
    pieces = pieces_of(text)
    places = [i for i, piece in enumerate(pieces) if not piece.isspace()]
    words = [pieces[i] for i in places]
    shortest, longest = _LOOP_WORDS
    if len(words) < 2 * shortest:
        return None
    length = draws.randint(shortest, min(longest, len(words) // 2))
    start = draws.randint(0, len(words) - 2 * length)
    phrase = words[start : start + length]
    for place, word in zip(places[start:], cycle(phrase), strict=False):
        pieces[place] = word
    looped = "".join(pieces)
    return looped if pieces_of(looped) == pieces else None  # words of two scripts that met would be one


RULES: dict[str, Rule] = {
    "shuffle": shuffle,
    "swap-sentences": swap_sentences,
    "swap-entities": swap_entities,
    "numbers": numbers,
    "repeat": repeat,
}


def spoil(rule: str, text: str, prefix: str, seed: int) -> str | None:
    """`text` as RULES[rule] spoils it, or None where it cannot."""
    draws = Random(seed)
    for _ in range(_TRIES):
        spoilt = RULES[rule](text, prefix, draws)
        if spoilt is not None and not same(spoilt, text):
            return spoilt
    return None


def same(one: str, other: str) -> bool:
    """Whether two texts differ in white space at most."""
    return one.split() == other.split()


def pieces_of(text: str) -> list[str]:
    """Words and the white space between them, which join to the text."""
    pieces: list[str] = []
    for piece in _PIECE.findall(text):
        if pieces and unicodedata.category(piece[0]).startswith("M") and not pieces[-1].isspace():
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def names_in(text: str) -> list[str]:
    """The different names in a text, in order."""
    names: list[str] = []
    end = -1
    for match in _NAME_WORD.finditer(text):
        word, place = match[0], match.start()
        while place and text[place - 1] == " ":
            place -= 1
        before = text[place - 1 : place] if place else ""
        if not word[0].isupper() or len(word) < 2 or word[1] in "'’":
            continue
        if names and match.start() == end + 1 and text[end] == " ":
            names[-1] += " " + word
        elif before and before not in _SENTENCE_ENDS and not before.isspace():
            names.append(word)
        else:
            continue
        end = match.end()
    return list(dict.fromkeys(names))


def _reordered(words: Sequence[str], draws: Random) -> list[str] | None:
    """A permutation that is another sequence; None where there is none."""
    if len(set(words)) < 2:
        return None
    mixed = list(words)
    while mixed == list(words):
        draws.shuffle(mixed)
    return mixed


def _other_number(number: str, draws: Random) -> str:
    digits = [unicodedata.decimal(character) for character in number]
    other = digits
    while other == digits:
        other = [draws.randint(1 if i == 0 and digits[0] and len(digits) > 1 else 0, 9) for i in range(len(digits))]
    return "".join(chr(ord(old) - value + new) for old, value, new in zip(number, digits, other, strict=True))
