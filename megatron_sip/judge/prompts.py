"""Prompt files: their format, the built-in ones, and how texts get into them without being able to interfere.

A prompt file is text with a TOML header between two lines `+++`:

    +++
    name = "politeness"            # what scores and metrics call it
    version = 1                    # raise it when the wording changes: cached verdicts of other versions are not reused
    kind = "pointwise"             # pointwise | pairwise | text
    pattern = 'RATING:\\s*(GOOD|BAD)'   # one group: the verdict
    start = "RATING: "             # what a soft verdict makes the answer begin with (optional)
    position = "last"              # the answer ends with its verdict (default); "anywhere": reasons may follow (optional)
    [values]
    GOOD = 1.0
    BAD = 0.0
    +++
    ... {{candidate}} ...

Slots: {{prefix}}, {{reference}} (the original suffix), {{candidate}} (pointwise), {{option_1}} and {{option_2}}
(pairwise), {{code}}. Texts are put between marks that carry a code which their authors cannot know, and chat-template
tokens in them are broken up, so that no text can end its own field, speak as another role or issue a verdict.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_sip.errors import UserError
from megatron_sip.judge.verdicts import VerdictRule

TEXT_SLOTS = ("prefix", "reference", "candidate", "option_1", "option_2", "continuation", "text")
PLAIN_SLOTS = ("code", "first_words")
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_REQUIRED_SLOTS = {"pairwise": {"option_1", "option_2"}, "pointwise": {"candidate"}, "text": set[str]()}
_HEADER_KEYS = {"name", "version", "kind", "description", "pattern", "start", "position", "values"}

# Role, turn and reasoning marks of the common chat templates.
_TEMPLATE_MARKS = re.compile(
    r"<[|｜][^<>|｜\n]{1,60}[|｜]>|</?s>|</?(?:\w{1,12}[:|])?(?:think(?:ing)?|thought|reasoning)>|◁/?think▷|<channel\|>"
    r"|\[/?THINK\]|<</?SYS>>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS"
    r"|TOOL_RESULTS|gMASK|SYSTEM_PROMPT)\]|</?(?:bos|eos|pad|unk|mask|(?=[^\W_]{0,30}_)\w{1,61})>|<\|",
    re.IGNORECASE,
)


class PromptError(UserError, ValueError):
    """A prompt file that cannot be used; the message names the file and what would be right."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A parsed prompt file. `body` is split at its slots: odd entries are slot names."""

    name: str
    version: int
    kind: str
    description: str
    body: tuple[str, ...]
    start: str
    rule: VerdictRule | None
    source: str
    text_pattern: re.Pattern[str] | None = None

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(self.body[1::2])

    @property
    def identity(self) -> str:
        """What a cached verdict is tied to: name, version and a digest of the wording and of how answers are read."""
        reading = "" if self.rule is None else repr((self.rule.pattern.pattern, self.rule.values, self.rule.anywhere))
        digest = hashlib.blake2b("\x00".join((*self.body, self.start, reading)).encode(), digest_size=6).hexdigest()
        return f"{self.name}@{self.version}#{digest}"

    def fill(self, texts: Mapping[str, str], code: str, first_words: str = "") -> tuple[str, ...]:
        """The prompt in pieces, texts fenced; pieces recur between a task's prompts, so their ids can be cached.

        Raises KeyError for a slot without text.
        """
        pieces = []
        for place, piece in enumerate(self.body):
            if place % 2 == 0:
                pieces.append(piece)
            elif piece == "code":
                pieces.append(code)
            elif piece == "first_words":
                pieces.append(break_marks(first_words))
            else:
                pieces.append(fence(piece, texts[piece], code))
        return tuple(piece for piece in pieces if piece)

    def text_of(self, answer: str) -> str | None:
        """The text that an answer to a prompt of kind text gives: what its pattern's group finds, without one all of it."""
        if self.text_pattern is None:
            return answer
        found = self.text_pattern.search(answer)
        return None if found is None else found[1]


@lru_cache(maxsize=4096)  # a task's prefix recurs in each of its prompts, a candidate in several
def fence(slot: str, text: str, code: str) -> str:
    """`text` between two marks of its own; see `fence_code`."""
    title = slot.replace("_", " ")
    return f"[begin {title} {code}]\n{break_marks(text)}\n[end {title} {code}]"


def fence_code(seed: int, prefix: str, texts: Iterable[str]) -> str:
    """A code of 8 hex digits for one task's fences that occurs in none of its texts.

    Equal for all requests of a task, so that they share their prefix in the server's cache. Texts are written before
    the code exists, and it depends on the whole prefix and the run's seed: nobody can write it into a text.
    """
    texts = list(texts)
    for attempt in range(1000):
        material = f"{seed}\x00{attempt}\x00{prefix}".encode(errors="surrogatepass")
        code = hashlib.blake2b(material, digest_size=4).hexdigest()
        if code not in prefix and not any(code in text for text in texts):
            return code
    raise PromptError("no fence code found that the texts do not contain")


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates (broken escapes in documents) replaced, so that it can be sent."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def break_marks(text: str) -> str:
    """`text` with a space inside everything that a chat template could take for a mark.

    A space is inserted, nothing removed: taking a mark out of the middle of another could make a new one.
    """
    if "<" in text or "[" in text:
        text = _TEMPLATE_MARKS.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def read_prompt_file(path: Path) -> PromptFile:
    """Read and check one prompt file. Raises PromptError, FileNotFoundError."""
    return parse_prompt(path.read_text(encoding="utf-8"), str(path))


def find_prompt(name: str) -> PromptFile:
    """A built-in prompt, or the prompt file of that path (*.txt). Raises PromptError, FileNotFoundError."""
    return read_prompt_file(Path(name)) if name.endswith(".txt") else builtin_prompt(name)


def parse_prompt(content: str, source: str) -> PromptFile:
    """Parse the text of a prompt file; `source` is named in errors."""
    header, body = _split_header(content, source)
    unknown = set(header) - _HEADER_KEYS
    if unknown:
        raise PromptError(f"{source}: unknown header keys {sorted(unknown)}; known: {sorted(_HEADER_KEYS)}")
    kind, name = header.get("kind"), header.get("name")
    if kind not in _REQUIRED_SLOTS or not isinstance(name, str) or not name:
        raise PromptError(f"{source}: the header needs name = '...' and kind = pointwise | pairwise | text")
    pieces = tuple(_SLOT.split(body))
    slots = set(pieces[1::2])
    if unknown := slots - set(TEXT_SLOTS) - set(PLAIN_SLOTS):
        raise PromptError(f"{source}: unknown slots {sorted(unknown)}; known: {', '.join(TEXT_SLOTS + PLAIN_SLOTS)}")
    if missing := _REQUIRED_SLOTS[kind] - slots:
        wanted = " and ".join("{{" + slot + "}}" for slot in sorted(missing))
        raise PromptError(f"{source}: a {kind} prompt must contain {wanted}")
    rule = None if kind == "text" else _verdict_rule(header, source)
    text_pattern = _pattern(header, source) if kind == "text" and "pattern" in header else None
    version, about, start = int(header.get("version", 1)), header.get("description", ""), header.get("start", "")
    return PromptFile(name, version, kind, about, pieces, start, rule, source, text_pattern)


def _split_header(content: str, source: str) -> tuple[dict[str, Any], str]:
    parts = re.split(r"^\+\+\+[ \t]*\n", content, maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3 or parts[0].strip():
        raise PromptError(f"{source}: a prompt file starts with a TOML header between two lines '+++'")
    try:
        return tomllib.loads(parts[1]), parts[2].strip()
    except tomllib.TOMLDecodeError as error:
        raise PromptError(f"{source}: the header is not TOML: {error}") from error


def _verdict_rule(header: Mapping[str, Any], source: str) -> VerdictRule:
    pattern = _pattern(header, source)
    values = header.get("values") or {}
    if len(values) < 2 or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values.values()):
        raise PromptError(f"{source}: [values] must give at least two verdicts a number from 0 to 1")
    position = header.get("position", "last")
    if position not in ("last", "anywhere"):
        raise PromptError(f"{source}: position '{position}' is neither last nor anywhere")
    numbers = {label: float(value) for label, value in values.items()}
    return VerdictRule(pattern, numbers, header.get("start", ""), position == "anywhere")


def _pattern(header: Mapping[str, Any], source: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(header["pattern"], re.IGNORECASE)
    except KeyError:
        raise PromptError(f"{source}: the header needs pattern = '...', a regular expression for the verdict") from None
    except re.error as error:
        raise PromptError(f"{source}: pattern is not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise PromptError(f"{source}: pattern needs exactly one group (the verdict), it has {pattern.groups}")
    return pattern


def builtin_names() -> list[str]:
    """Names of the prompts in this package, as `--criteria` and `show` spell them."""
    return sorted(_spelling(entry.name) for entry in _folder().iterdir() if entry.name.endswith(".txt"))


@cache
def builtin_prompt(name: str) -> PromptFile:
    """A prompt of this package: `quality`, `safety`, `factuality` (= `factuality:v4`), `factuality-noref:v2`, ..."""
    if name in ("factuality", "factuality-noref"):
        name += ":v4"
    if name not in builtin_names():
        raise PromptError(f"no prompt '{name}'; there are: {', '.join(builtin_names())}")
    entry = _folder() / (name.replace(":", "-") + ".txt")
    return parse_prompt(entry.read_text(encoding="utf-8"), entry.name)


def _folder() -> Any:
    return files("megatron_sip.judge") / "prompts"


def _spelling(filename: str) -> str:
    return re.sub(r"-(v\d+)$", r":\1", filename.removesuffix(".txt"))
