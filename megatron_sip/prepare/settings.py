"""What the commands of `python -m megatron_sip.prepare` are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sip.data.roles import DocumentRole, Shares, Split
from megatron_sip.data.tasks import TaskSettings
from megatron_sip.errors import UserError
from megatron_sip.judge.corruption import CorruptorSettings
from megatron_sip.judge.prompts import PromptFile, find_prompt
from megatron_sip.judge.settings import JudgeSettings

RecordFormat = Literal["sip", "verl", "nemo-gym"]
FORMATS: tuple[RecordFormat, ...] = ("sip", "verl", "nemo-gym")


class PrepareError(UserError, ValueError):
    """Settings that cannot work, or a folder that holds other work; the message names the flag or file and the mend."""


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """Which documents are read: those of `role`, and of `split` unless that is None, by a hash of their text (data/roles.py),
    `max_documents` of them at most.

    paths: text files, in this order. subset_field: what a record's subset is called after; fields inside objects as
    "meta.source"; None: the file's name. label_field: says whether a record's text is safe, by `safe_labels` and
    `unsafe_labels`. prefix_field: what stands before the text.
    """

    paths: tuple[Path, ...]
    role: DocumentRole
    shares: Shares
    seed: int = 1234
    text_field: str = "text"
    prefix_field: str | None = None
    subset_field: str | None = None
    label_field: str | None = None
    safe_labels: tuple[str, ...] = ()
    unsafe_labels: tuple[str, ...] = ()
    max_documents: int | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise PrepareError(f"--max-documents {self.max_documents}: at least 1 is needed; leave it out to read all")


@dataclass(frozen=True, slots=True)
class CutSettings:
    """How documents become a prefix and a suffix: by tokens of `tokenizer` (a folder), as the trainer cuts them, or not at
    all, where `whole`: a document's text is then the suffix.

    A tokenizer of whole texts says how long the versions that a model spoils may be: as the text.
    """

    tasks: TaskSettings
    tokenizer: str | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Where records go. balance: the field of which each value gets as many records, in each split. rewrite_prompt: the
    rewriter's instructions that other trainers are given, None: this package's own."""

    folder: Path
    formats: tuple[RecordFormat, ...] = ("sip",)
    balance: str | None = None
    seed: int = 1234
    rewrite_prompt: PromptFile | None = None


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """Pairs of an original suffix and a spoilt one. rules: how it is spoilt, one of them drawn for each place; `corruptor`
    is asked where "teacher" is among them. criterion: the prompt that asks about them, with the verdicts 1 and 2.

    Raises PrepareError for another kind of prompt.
    """

    rules: tuple[str, ...]
    corruptor: CorruptorSettings | None
    seed: int = 1234
    criterion: str = "quality"

    def __post_init__(self) -> None:
        prompt = find_prompt(self.criterion)
        if prompt.kind != "pairwise" or prompt.rule is None or set(prompt.rule.labels) != {"1", "2"}:
            raise PrepareError(f"--criterion {self.criterion}: a pairwise prompt with the verdicts 1 and 2 is needed")


@dataclass(frozen=True, slots=True)
class VoteSettings:
    """Labels by a judge with one criterion (paper section 3.1)."""

    judge: JudgeSettings


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Which of a run's recorded judgements become labels.

    agreement: share of the verdicts about a pair (or of one candidate) that say the same. min_votes: least number of them.
    one_order: also of pairs that were shown in one order only. per_group: pairs (or candidates) of a group at most.
    """

    folder: Path
    splits: Shares
    agreement: float = 0.9
    min_votes: int = 2
    one_order: bool = False
    per_group: int = 4
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0.5 < self.agreement <= 1:
            raise PrepareError(f"--agreement {self.agreement}: a share above 0.5 and at most 1 is needed")
        if self.min_votes < 1 or self.per_group < 1:
            raise PrepareError(
                f"--min-votes {self.min_votes} and --per-group {self.per_group}: at least 1 is needed of each"
            )
