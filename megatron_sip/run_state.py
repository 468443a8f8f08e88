"""Where a run is, as a checkpoint keeps it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field


@dataclass(slots=True)
class RunState:
    """Where a run is: what a checkpoint keeps beside the policy, among Megatron's arguments, under names that stay.

    consumed_samples: the cursor of the tasks, of what was trained. last_saved: iteration of the newest checkpoint, None before
    the first. non_finite_steps: in a row, up to now. task_fingerprint: of the tasks that the cursor counts. learnt: nothing is
    left to. experience_ahead: of the step behind the checkpoint, see `experience.ahead`. trained: (iteration, consumed samples)
    behind the last step that changed anything.
    """

    iteration: int = 0
    consumed_samples: int = 0
    last_saved: int | None = None
    non_finite_steps: int = 0
    task_fingerprint: str | None = None
    learnt: bool = False
    experience_ahead: bytes | None = None
    trained: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.note_trained()

    def note_trained(self) -> None:
        """The present step changed weights or reference, or is the run's last."""
        self.trained = self.iteration, self.consumed_samples

    def forget_empty_steps(self) -> bool:
        """Go back behind those that changed nothing, so that their tasks are asked again; whether there are any."""
        where = self.iteration, self.consumed_samples
        self.iteration, self.consumed_samples = self.trained
        return where != self.trained

    @classmethod
    def loaded(
        cls, args: argparse.Namespace, saved: argparse.Namespace | None, task_fingerprint: str | None
    ) -> RunState:
        """Of the checkpoint that Megatron has just loaded into `args`, and that kept `saved`; None: of a run that begins."""
        return cls(
            iteration=args.iteration,
            consumed_samples=args.consumed_train_samples,
            last_saved=args.iteration or None,
            non_finite_steps=getattr(saved, "non_finite_steps", 0),
            task_fingerprint=task_fingerprint,
            learnt=getattr(saved, "learnt", False),
            experience_ahead=getattr(saved, "experience_ahead", None),
        )

    def write_into(self, args: argparse.Namespace) -> None:
        """Into the arguments that Megatron saves."""
        args.iteration = self.iteration
        args.consumed_train_samples = self.consumed_samples
        args.non_finite_steps = self.non_finite_steps
        args.task_fingerprint = self.task_fingerprint
        args.learnt = self.learnt
        args.experience_ahead = self.experience_ahead
