"""Prompts of a set as tasks, in an order that a seed decides: its beginning is a fair sample, and a longer one goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_sip.data.tokenization import DocumentEncoder, PrependBos, TokenizeSettings
from megatron_sip.errors import DataError
from megatron_sip.evaluation.suites.prompt_sets import Prompt, read_prompts
from megatron_sip.records import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptTasks:
    """Task i is prompt number `order[i]` of `prompts`. `cut`: how many of the first `samples` had more than `room` tokens.

    Of such a one the model is given the last `room` tokens; the task's text, which a judge reads, stays whole.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: int | None,
        room: int,
        prepend_bos: PrependBos,
        seed: int,
    ) -> None:
        """samples: how many are wanted, None: all. Raises DataError for a tokenizer that has not the BOS that is asked for, and
        for a `room` without a token of a prompt."""
        encoder = DocumentEncoder.of(tokenizer, TokenizeSettings(append_eos=False, prepend_bos=prepend_bos))
        backend = encoder.backend()
        self.room = room
        self.prompts = len(prompts)
        self.samples = len(prompts) if samples is None else min(samples, len(prompts))
        self.vocab_size = max(encoder.vocab_size, encoder.largest_id + 1)
        order = np.random.default_rng(seed).permutation(len(prompts))[: self.samples]
        self._prompts = [prompts[i] for i in order]
        prefixes = [prompt.prefix for prompt in self._prompts]
        encoded = [encoding.ids for encoding in backend.encode_batch(prefixes, add_special_tokens=False)]
        self._bos = [] if encoder.bos is None else [encoder.bos]
        most = room - len(self._bos)
        if most < 1:
            raise DataError(
                f"--seq-length minus --suffix-length leaves {room} tokens, BOS included, and none for a prompt: raise it"
            )
        self.cut = sum(len(ids) > most for ids in encoded)
        self._ids = [self._bos + ids[-most:] for ids in encoded]
        texts = [(prompt.prefix, prompt.suffix) for prompt in prompts]
        everything = repr((texts, room, encoder.fingerprint(), seed))
        self._fingerprint = hashlib.sha256(everything.encode("utf-8", "surrogatepass")).hexdigest()

    def tasks(self, start: int, count: int) -> list[Task]:
        """Tasks start, ..., start + count - 1."""
        return [
            Task(i, self._ids[i], [], self._prompts[i].prefix, self._prompts[i].suffix)
            for i in range(start, start + count)
        ]

    def document(self, index: int) -> tuple[str]:
        """The document of the set that task `index` is of."""
        return (self._prompts[index].document,)

    def fingerprint(self) -> str:
        """Equal for equal tasks, however many of them are asked for."""
        return self._fingerprint


def set_tasks(
    name: str,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    room: int,
    prepend_bos: PrependBos,
    seed: int,
    wikipedia: Path | None = None,
) -> PromptTasks:
    """The prompts of the set `name` in the file `path` as tasks. Raises DataError."""
    prompts = read_prompts(name, path, wikipedia)
    return PromptTasks(prompts, tokenizer, samples=samples, room=room, prepend_bos=prepend_bos, seed=seed)
