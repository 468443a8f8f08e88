"""Continuations of held-out prefixes by one model, in a file that grows line by line and is continued after a kill.

The first line says what the file is of: model, tasks, sampling. Each further line is one task in order: its prefix and
suffix, the document it is cut from, and the continuation. `compare` reads two of them, `diversity` one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_sip.data.continuation_text import rollout_texts
from megatron_sip.errors import DataError, UserError
from megatron_sip.evaluation.growing_file import append, begin
from megatron_sip.files import described, read_json_lines
from megatron_sip.records import Candidate, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings

FORMAT = "megatron-sip generations 1"
ENDED, CUT = 1, 0
"""Stand for the tokens of a continuation where only texts are judged: whether it ended by itself."""


class GenerationError(UserError, RuntimeError):
    """The engines gave no continuation; the message says what is kept and what to do."""


class DrawsTasks(Protocol):
    """What is needed of a source of tasks."""

    def tasks(self, start: int, count: int) -> list[Task]: ...

    def document(self, index: int) -> tuple[int | str, ...]:
        """What task `index` is of, such as (source, document); equal for tasks that are not independent."""
        ...


@dataclass(frozen=True, slots=True)
class Repeated:
    """The first `count` tasks of `once`, again and again: task i is task i % count under its own number.

    Sampled continuations of one prompt are then `count` lines apart, and of one document.
    """

    once: DrawsTasks
    count: int

    def tasks(self, start: int, count: int) -> list[Task]:
        return [replace(self.once.tasks(i % self.count, 1)[0], index=i) for i in range(start, start + count)]

    def document(self, index: int) -> tuple[int | str, ...]:
        return self.once.document(index % self.count)


@dataclass(frozen=True, slots=True)
class Generation:
    """One line: a task of the document named `document`, and the model's continuation of its prefix."""

    index: int
    document: str
    prefix: str
    suffix: str
    text: str
    ids: list[int]
    finish_reason: str

    def __post_init__(self) -> None:
        texts = (self.document, self.prefix, self.suffix, self.text, self.finish_reason)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"generation {self.index}: document, prefix, suffix, text and finish_reason are texts")

    @property
    def task(self) -> Task:
        """The task as a judge is shown it: texts alone."""
        return Task(self.index, [], [], self.prefix, self.suffix)

    @property
    def candidate(self) -> Candidate:
        """The continuation as a judge with the document end ENDED is shown it: its text, and whether it ended.

        Two models may have different tokenizers: their ids, and their ends, cannot be compared.
        """
        cut = self.finish_reason == "length"
        return Candidate("rollout", [CUT if cut else ENDED], self.text, truncated=cut)


@dataclass(frozen=True, slots=True)
class Generations:
    """A file of them: what it is of, and its whole lines."""

    header: dict[str, Any]
    lines: list[Generation]

    @property
    def about(self) -> dict[str, Any]:
        """What results about them say of the model."""
        return {name: self.header[name] for name in ("model", "step") if name in self.header}


def read_generations(path: Path) -> Generations:
    """A file that `generate` wrote. Raises DataError, which names the line; OSError."""
    values = read_json_lines(path, "a generation")
    if not values or not isinstance(values[0], dict) or values[0].get("format") != FORMAT:
        raise DataError(f"{path}: no file of generations; `megatron-sip-evaluate generate` writes one")
    with described(path, "a file of generations"):
        return Generations(values[0], [Generation(**value) for value in values[1:]])


async def generate(
    path: Path,
    header: Mapping[str, Any],
    engines: SGLangPool,
    tasks: DrawsTasks,
    tokenizer: Any,
    sampling: SamplingSettings,
    samples: int,
    *,
    batch: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Generations:
    """Continue the first `samples` tasks and add them to `path`, behind the ones that it holds; returns all of them.

    `progress` is told how many lines are new each time. A failure ends it, with what was there before written: nothing is
    left out.

    Raises:
        DataError: `path` holds something else, or generations of another model, other tasks or another sampling.
        GenerationError: the engines did not answer.
    """
    done = begin(path, {"format": FORMAT, **header, "sampling": asdict(sampling)}, "a file of generations")
    progress(min(done, samples))
    while done < samples:
        drawn = tasks.tasks(done, min(batch, samples - done))
        documents = [":".join(map(str, tasks.document(task.index))) for task in drawn]
        made = await continue_tasks(engines, drawn, documents, tokenizer, sampling)
        append(path, [asdict(line) for line in made])
        done += len(made)
        progress(len(made))
    return read_generations(path)


async def continue_tasks(
    engines: SGLangPool, tasks: Sequence[Task], documents: Sequence[str], tokenizer: Any, sampling: SamplingSettings
) -> list[Generation]:
    """One continuation of each task. Raises GenerationError when one is missing."""
    answers = await engines.generate([task.prefix_ids for task in tasks], sampling)
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    if failed:
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(answer.kind for answer in failed).most_common())
        raise GenerationError(
            f"{len(failed)} of {len(tasks)} prefixes got no continuation ({kinds}), as: {failed[0].reason}. What was made "
            "before is kept: once the engine answers, the same command goes on"
        )
    lines = []
    for task, document, answer in zip(tasks, documents, answers, strict=True):
        assert not isinstance(answer, Failure)
        [completion] = answer
        [text] = rollout_texts(tokenizer, task, [completion.ids])
        ids, finish = list(completion.ids), completion.finish_reason
        lines.append(Generation(task.index, document, task.prefix_text, task.suffix_text, text, ids, finish))
    return lines
