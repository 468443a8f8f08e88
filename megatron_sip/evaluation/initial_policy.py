"""What the initial policy said of held-out prefixes, kept in a file of the run for what is measured later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.files import described, read_json, write_atomically
from megatron_sip.records import Candidate, Task
from megatron_sip.rollout.sampling import SamplingSettings


@dataclass(frozen=True, slots=True)
class InitialPolicy:
    """Of each prefix; None where the engines gave nothing. control: at a lower temperature, of none where it is not compared.

    nll: nats of the true suffix; of none where it is not measured.
    """

    continuations: list[Candidate | None]
    control: list[Candidate | None]
    nll: list[float | None]


class InitialPolicyFile:
    """`path`, which holds an InitialPolicy of these tasks, sampled so. flag: of how many prefixes it is."""

    def __init__(self, path: Path, tasks: Sequence[Task], sampling: SamplingSettings, flag: str) -> None:
        self._path = path
        self._prefixes = len(tasks)
        self._flag = flag
        told = repr([(task.prefix_ids, task.suffix_ids) for task in tasks]).encode()
        self._header = {
            "prefixes": len(tasks),
            "tasks": hashlib.sha256(told).hexdigest(),
            "sampling": asdict(sampling),
        }

    def write(self, initial: InitialPolicy) -> None:
        """Keep it; the file appears only when it is complete."""
        write_atomically(self._path, json.dumps({**self._header, **asdict(initial)}))

    def read(self) -> InitialPolicy:
        """What was written at the run's start.

        Raises:
            DataError: it is gone, or is of other prefixes or another sampling.
        """
        if not self._path.exists():
            raise DataError(
                f"{self._path}: what the initial policy said is written at step 0, and is not there; continue with the "
                f"--run-dir of the run's start, or without {self._flag}"
            )
        content = read_json(self._path, "what the initial policy said")
        with described(self._path, "what the initial policy said"):
            if content["prefixes"] != self._prefixes:
                raise DataError(
                    f"{self._path} is of {content['prefixes']} prefixes: continue with {self._flag} {content['prefixes']}"
                )
            for name in ("tasks", "sampling"):
                if content[name] != self._header[name]:
                    raise DataError(
                        f"{self._path} is of other {name} ({content[name]}, now {self._header[name]}): continue with the "
                        "flags of the run's start"
                    )
            texts = [
                [None if c is None else Candidate(**c) for c in content[part]] for part in ("continuations", "control")
            ]
            return InitialPolicy(texts[0], texts[1], content["nll"])
