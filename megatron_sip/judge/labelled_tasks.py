"""Labelled records as tasks of the policy: it is asked in the very words, ids and marks that a judge or rewriter is asked in.

A record of a judgement holds "criterion", "verdict" (the right one, a label of the criterion's prompt), "prefix", "suffix"
(the original) and "candidate", or "option_1" and "option_2" for a pairwise criterion; one of a rewrite "prefix", "suffix" and
"safe" (true or false); one of a thought "prefix", "suffix", "start_mark" and "end_mark". "subset" says where it comes from,
"pair" what the two orders of the same texts share. Other fields are left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megatron_sip.data.labelled import WritesTasks
from megatron_sip.errors import DataError
from megatron_sip.judge.base import UNKNOWN_CODE
from megatron_sip.judge.calls import Call
from megatron_sip.judge.criteria import Sampling, judgement
from megatron_sip.judge.encoding import ChatEncoder, EncodingError
from megatron_sip.judge.prefix_window import MARGIN_TOKENS, MIN_PREFIX_TOKENS, PrefixWindow
from megatron_sip.judge.prompts import (
    PromptFile,
    break_marks,
    builtin_prompt,
    fence_code,
    find_prompt,
    valid_unicode,
)
from megatron_sip.judge.rewriter import START_BYTES, last_words, read_rewrite_prompt, rewrite_call
from megatron_sip.judge.settings import VerdictMode
from megatron_sip.judge.wire import prompt_ids
from megatron_sip.records import Judgement, Rewriting, Task, Thinking

LabelledKind = Literal["judgements", "rewrites", "thoughts"]

Record = dict[str, Any]
TEXT_FIELDS = ("prefix", "suffix", "candidate", "option_1", "option_2")

_UNSAMPLED = Sampling(votes=1, temperature=0.0, top_p=1.0, max_tokens=0)
"""How a judge samples is no part of what it is shown."""


@dataclass(frozen=True, slots=True)
class LabelledSettings:
    """max_prompt, max_answer: in the policy's tokens. prefix_chars: of a longer prefix the end is shown, as to a judge.

    verdicts, default_verdict: by criterion; soft: the answer is begun up to its label, hard: it is written. seed: of the marks
    around texts. begins_with: the token that a thought's document begins with, if any. rewrite_prompt: a rewriter's own.
    """

    kind: LabelledKind
    max_prompt: int
    max_answer: int
    prefix_chars: int = 16_000
    default_verdict: VerdictMode = "soft"
    verdicts: Mapping[str, VerdictMode] = field(default_factory=dict)
    seed: int = 1234
    begins_with: int | None = None
    rewrite_prompt: Path | None = None

    def mode(self, criterion: str) -> VerdictMode:
        return self.verdicts.get(criterion, self.default_verdict)


def make_writer(settings: LabelledSettings, tokenizer: Any) -> WritesTasks:
    """What makes tasks of records of the settings' kind, for the policy with this tokenizer.

    Raises:
        DataError: a tokenizer without a chat template that can be used.
    """
    if settings.kind == "thoughts":
        return ThoughtWriter(settings, tokenizer)
    encoder = ChatEncoder(tokenizer)
    try:
        unknown = encoder.reasoning.unknown
    except EncodingError:
        raise DataError(
            f"--tasks {settings.kind}: the policy's tokenizer has no chat template: start from a post-trained (chat) model"
        ) from None
    if unknown:
        raise DataError(
            f"--tasks {settings.kind}: the policy's chat template ends with '{unknown}', which seems to open reasoning, and "
            "what ends that is not known"
        )
    if settings.kind == "judgements":
        return JudgementWriter(settings, encoder)
    return RewriteWriter(settings, encoder, tokenizer)


class PromptWriter(ABC):
    """What judgements and rewrites have in common: a chat prompt, whose prefix is cut at its left until it fits."""

    def __init__(self, settings: LabelledSettings, encoder: ChatEncoder) -> None:
        self._settings = settings
        self._encoder = encoder
        self._window = PrefixWindow(settings.prefix_chars, settings.max_prompt, lambda text: len(encoder.text(text)))
        self._frames: dict[tuple[str, str], int] = {}  # tokens of a prompt without texts, by its wording and mode
        self.counts: Counter[str] = Counter()

    @property
    def identity(self) -> str:
        """Wording, and of the settings what the prompts depend on."""
        used = self._settings
        return repr((used.kind, used.max_prompt, used.prefix_chars, used.seed, sorted(self._frames)))

    @abstractmethod
    def call(self, record: Record, prefix: str, code: str | None = None) -> Call:
        """What a judge or rewriter is asked about the record when it is shown `prefix` of its prefix."""

    @abstractmethod
    def check(self, record: Record) -> PromptFile:
        """The prompt of a record. Raises ValueError for a field that is missing or wrong."""

    def _mode(self, record: Record) -> str:
        """What else than its wording a record's prompt depends on."""
        return ""

    def fits(self, record: Record) -> bool:
        """Whether the prompt is short enough with the end of the prefix alone. Raises ValueError as `check` does."""
        prompt = self.check(record)
        frame = prompt.identity, self._mode(record)
        if frame not in self._frames:
            self._frames[frame] = self._tokens({**record, **dict.fromkeys(TEXT_FIELDS, "")})
        texts = [record.get(name, "") for name in TEXT_FIELDS if name != "prefix"]
        # No tokenizer makes more tokens than there are bytes: few records have to be tokenised to know.
        most = sum(len(break_marks(valid_unicode(text)).encode()) for text in texts) + 3 * START_BYTES
        taken = MARGIN_TOKENS + MIN_PREFIX_TOKENS + self._frames[frame]
        return most <= self._settings.max_prompt - taken or self._shown(record) is not None

    def _shown(self, record: Record) -> str | None:
        """The end of the prefix that fits, as `PrefixWindow` cuts it for a judge; None when next to nothing does."""
        return self._window.shown(valid_unicode(record["prefix"]), lambda: self._tokens(record))

    def _tokens(self, record: Record) -> int:
        """The most that the prompt has without its prefix, whatever the code in its marks: of eight letters and digits."""
        call = self.call(record, "", UNKNOWN_CODE)
        codes = sum(piece.count(UNKNOWN_CODE) for piece in call.prompt)
        longer = len(UNKNOWN_CODE) - len(self._encoder.text(UNKNOWN_CODE))
        return len(prompt_ids(call, self._encoder)) + codes * longer

    def _asked(self, record: Record) -> tuple[list[int], str]:
        """The prompt's ids, up to where the policy goes on, and its text."""
        self.check(record)
        prefix = self._shown(record)
        if prefix is None:
            raise ValueError("its prompt does not fit into --max-prompt-length")
        self.counts["prompts-cut"] += prefix != valid_unicode(record["prefix"])
        call = self.call(record, prefix)
        return prompt_ids(call, self._encoder), "".join(call.prompt)


class JudgementWriter(PromptWriter):
    """The judge's prompts, with the right label beside them (paper section 3.1)."""

    def __init__(self, settings: LabelledSettings, encoder: ChatEncoder) -> None:
        super().__init__(settings, encoder)
        self._criteria: set[str] = set()

    def require_criteria(self) -> None:
        """Once all records have been seen: raises DataError for a criterion of --judge-verdict that none of them has."""
        if unknown := sorted(set(self._settings.verdicts) - self._criteria):
            raise DataError(
                f"--judge-verdict of {', '.join(unknown)}: no record has such a criterion; there are: "
                f"{', '.join(sorted(self._criteria))}"
            )

    def check(self, record: Record) -> PromptFile:
        """The criterion's prompt. Raises ValueError for a field that is missing or wrong."""
        name = _text(record, "criterion")
        prompt = judge_prompt(name)
        self._criteria.add(name)
        assert prompt.rule is not None
        if record.get("verdict") not in prompt.rule.labels:
            labels = ", ".join(f'"{label}"' for label in prompt.rule.labels)
            raise ValueError(f'"verdict" is {record.get("verdict")!r}; a verdict of {name} is one of {labels}')
        for field_name in ("prefix", *_options(prompt)):
            _text(record, field_name)
        for field_name in ("suffix", "subset"):
            _text(record, field_name, needed=False)
        if self._settings.mode(name) == "soft":
            _check_forced(prompt, name)
            self._encoder.choices(prompt.rule.start, prompt.rule.labels)
        return prompt

    def _mode(self, record: Record) -> VerdictMode:
        """Whether its answer is begun."""
        return self._settings.mode(record["criterion"])

    def call(self, record: Record, prefix: str, code: str | None = None) -> Call:
        """The judgement that `criteria.judgement` asks for."""
        prompt = judge_prompt(record["criterion"])
        shown = {name: valid_unicode(record[name]) for name in _options(prompt)}
        original = valid_unicode(record.get("suffix") or "")
        code = code or fence_code(self._settings.seed, prefix, [*shown.values(), original])
        texts = {"prefix": prefix, "reference": original, **shown}
        return judgement(prompt, texts, code, self._settings.mode(record["criterion"]), _UNSAMPLED, 1)

    def task(self, index: int, record: Record) -> Task:
        """Its texts are the filled prompt and the right label."""
        ids, prompt = self._asked(record)
        forced = self._settings.mode(record["criterion"]) == "soft"
        pair = record.get("pair")
        label = Judgement(
            criterion=record["criterion"],
            verdict=record["verdict"],
            forced=forced,
            pair="" if pair is None else str(pair),
            subset=record.get("subset") or "",
            special_marks=self._encoder.reasoning.special_marks,
        )
        return Task(index, ids, [], prompt, record["verdict"], label)


class RewriteWriter(PromptWriter):
    """The rewriter's prompts, each with the words that its answer is started with (paper section 3.2.1)."""

    def __init__(self, settings: LabelledSettings, encoder: ChatEncoder, tokenizer: Any) -> None:
        super().__init__(settings, encoder)
        self._tokenizer = tokenizer
        own = settings.rewrite_prompt
        self._prompt = builtin_prompt("rewrite") if own is None else read_rewrite_prompt(own)

    @property
    def identity(self) -> str:
        """With the length that suffixes are cut to."""
        return repr((super().identity, self._settings.max_answer))

    def check(self, record: Record) -> PromptFile:
        """The rewriter's prompt. Raises ValueError for a field that is missing or wrong."""
        for name in ("prefix", "suffix"):
            _text(record, name)
        _text(record, "subset", needed=False)
        if not record["suffix"].strip():
            raise ValueError('"suffix" is empty; it is what is to be rewritten')
        if not isinstance(record.get("safe"), bool):
            raise ValueError(f'"safe" is {record.get("safe")!r}; it must be true or false')
        return self._prompt

    def call(self, record: Record, prefix: str, code: str | None = None) -> Call:
        """The request that `Rewriter` makes."""
        return rewrite_call(
            self._prompt, prefix, record["suffix"], last_words(record["prefix"]), self._settings.seed, code
        )

    def task(self, index: int, record: Record) -> Task:
        """Its texts are those that are rewritten; a suffix that an answer cannot hold is cut at its end, and counted."""
        suffix = self._copyable(record["suffix"])
        ids, _ = self._asked({**record, "suffix": suffix})
        marks = self._encoder.reasoning.special_marks
        label = Rewriting(safe=record["safe"], subset=record.get("subset") or "", special_marks=marks)
        return Task(index, ids, [], record["prefix"], suffix, label)

    def _copyable(self, suffix: str) -> str:
        """As much of a suffix as an answer may repeat before the token that ends it."""
        most = self._settings.max_answer - 1
        if len(suffix.encode(errors="replace")) <= most or len(self._encoder.text(valid_unicode(suffix))) <= most:
            return suffix
        self.counts["suffixes-cut"] += 1
        offsets = self._tokenizer(
            suffix, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        return suffix[: offsets[most - 1][1]] if most else ""


class ThoughtWriter:
    """Text up to a place where a thought begins, plain as the policy was pretrained (the paper's later version)."""

    def __init__(self, settings: LabelledSettings, tokenizer: Any) -> None:
        self._settings = settings
        self._encoder = ChatEncoder(tokenizer)
        self.counts: Counter[str] = Counter()

    @property
    def identity(self) -> str:
        """Of the settings what the tasks depend on."""
        return repr((self._settings.kind, self._settings.max_prompt, self._settings.begins_with))

    def fits(self, record: Record) -> bool:
        """Whether the start mark does, with some of the text. Raises ValueError for a field that is missing or wrong."""
        for name in ("prefix", "suffix", "start_mark", "end_mark"):
            _text(record, name)
        _text(record, "subset", needed=False)
        for name in ("prefix", "suffix", "end_mark"):
            if not record[name].strip():
                raise ValueError(f'"{name}" is empty')
        mark = len(self._encoder.text(record["start_mark"]))
        return mark + MIN_PREFIX_TOKENS <= self._settings.max_prompt

    def task(self, index: int, record: Record) -> Task:
        """Its texts are those before and after the place; the policy goes on behind the start mark."""
        begin = [] if self._settings.begins_with is None else [self._settings.begins_with]
        ids = begin + self._encoder.text(valid_unicode(record["prefix"] + record["start_mark"]))
        self.counts["prompts-cut"] += len(ids) > self._settings.max_prompt
        label = Thinking(end_mark=record["end_mark"], subset=record.get("subset") or "")
        return Task(index, ids[-self._settings.max_prompt :], [], record["prefix"], record["suffix"], label)


@cache
def judge_prompt(name: str) -> PromptFile:
    """The prompt of a criterion as --criteria spells it. Raises ValueError."""
    try:
        prompt = find_prompt(name)
    except FileNotFoundError:
        raise ValueError(f'"criterion" is {name!r}: there is no such prompt file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'"criterion" is {name!r}: it cannot be read: {error}') from error
    if prompt.rule is None:
        raise ValueError(
            f'"criterion" is {name!r}, a prompt without verdicts: one of kind pointwise or pairwise is needed'
        )
    return prompt


def _options(prompt: PromptFile) -> tuple[str, ...]:
    """The fields with what is judged."""
    return ("option_1", "option_2") if prompt.kind == "pairwise" else ("candidate",)


def _check_forced(prompt: PromptFile, name: str) -> None:
    """Raises ValueError where an answer cannot be begun up to the label."""
    assert prompt.rule is not None
    if not prompt.start:
        raise ValueError(
            f"{name}: a soft verdict needs start = '...' in its prompt file: add it, or --judge-verdict hard"
        )
    if len({label[:1] for label in prompt.rule.labels}) == 1:
        raise ValueError(f"{name}: its verdicts {list(prompt.rule.labels)} begin alike: --judge-verdict {name}=hard")


def _text(record: Record, name: str, *, needed: bool = True) -> str:
    value = record.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f'"{name}" {found}; it must be a text (the record has {sorted(record)[:12]})')
    return value
