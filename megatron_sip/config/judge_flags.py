"""The flags of `python -m megatron_sip.judge accuracy` and `... labels`, and what these are told by them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sip.config.flags import JUDGE_FLAGS, Flags, add_flags, add_teacher_flags
from megatron_sip.config.prepare_flags import CALL_SECONDS, UNIT_SECONDS
from megatron_sip.config.teacher_settings import client_settings
from megatron_sip.errors import ArgumentError
from megatron_sip.judge.exam import ExamSettings
from megatron_sip.judge.settings import VerdictMode

COMMON_FLAGS: Flags = {
    "--model": ({"metavar": "DIR"}, "Start an SGLang server of this HF model on this node, in place of --teacher-url."),
    "--save": ({"metavar": "FILE.json"}, "Write the figures there, as JSON."),
    "--beside": (
        {"nargs": "+", "default": [], "metavar": "FILE.json"},
        "Also show what earlier runs wrote with --save: a row for each model.",
    ),
    "--judge-votes": ({"type": int, "default": 1}, "Written verdicts asked of a question."),
    "--seed": ({"type": int, "default": 1234}, "Of the marks around texts, and of the interval's resampling."),
}
SAMPLING = (
    *("--judge-temperature", "--judge-top-p", "--judge-max-tokens", "--judge-deadline"),
    *("--judge-concurrency", "--judge-cache"),
)
"""Of the trainer's flags about judges, those that matter to single questions."""


def add_accuracy_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `accuracy`."""
    parser.add_argument("records", metavar="RECORDS", type=Path, help="judgements, as `prepare judgements` writes them")
    parser.add_argument("--split", choices=("train", "valid", "test"), help="only records of this split; default: all")
    parser.add_argument(
        "--judge-verdict",
        choices=("soft", "hard"),
        default="soft",
        help="soft: the verdict that is likelier as the first token; hard: the one that the judge writes",
    )
    _add_common_flags(parser)


def add_labels_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `labels`."""
    parser.add_argument("prefixes", metavar="PREFIXES", type=Path, help="JSON lines with the fields prefix and suffix")
    parser.add_argument(
        "--criteria", nargs="+", required=True, metavar="NAME", help="pointwise criteria, such as factuality:v1"
    )
    parser.add_argument(
        "--candidate-field", metavar="NAME", help="field of the continuation that is rated; default: the suffix itself"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N records only")
    parser.set_defaults(judge_verdict="hard")
    _add_common_flags(parser)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, COMMON_FLAGS)
    group = parser.add_argument_group("the judge")
    add_teacher_flags(group)
    add_flags(group, {name: JUDGE_FLAGS[name] for name in SAMPLING})
    parser.set_defaults(judge_deadline=UNIT_SECONDS, teacher_timeout=CALL_SECONDS)


def exam_settings(args: argparse.Namespace, url: str | None = None) -> ExamSettings:
    """How the judge is asked; at `url` in place of --teacher-url. Raises SettingsError, ArgumentError."""
    if url is None and not args.teacher_url:
        raise ArgumentError("--teacher-url or --model is needed: the judge")
    client = client_settings(args, "teacher")
    mode: VerdictMode = "hard" if args.judge_verdict == "hard" else "soft"
    return ExamSettings(
        client=client if url is None else client.at([url]),
        mode=mode,
        votes=args.judge_votes,
        temperature=args.judge_temperature,
        top_p=args.judge_top_p,
        max_tokens=args.judge_max_tokens,
        deadline_s=args.judge_deadline,
        prefix_chars=args.judge_prefix_chars,
    )
