"""The flags of `python -m megatron_sip.prepare thoughts`, and what it is told by them."""

from __future__ import annotations

import argparse

from megatron_sip.config.flags import JUDGE_FLAGS, Flags, add_flags, add_teacher_flags
from megatron_sip.config.prepare_flags import OUTPUT_FLAGS, READ_FLAGS, UNIT_SECONDS, output_settings, read_settings
from megatron_sip.config.teacher_settings import client_settings
from megatron_sip.judge.thought_writer import ThoughtSettings
from megatron_sip.prepare.settings import PrepareError
from megatron_sip.prepare.thoughts import ThinkingSettings, ThoughtsWork

CALL_SECONDS = 1800.0
"""For one attempt of a call: 8192 tokens at 5 a second."""
NOT_READ = ("--prefix-field",)
"""Of the flags about documents, those of other commands."""
CHUNK_FLAGS: Flags = {
    "--tokenizer": ({"required": True, "metavar": "DIR"}, "Tokenizer by whose tokens documents are cut: the policy's."),
    "--seq-length": (
        {"type": int, "default": 2048, "metavar": "N"},
        "Tokens of a chunk without its thoughts, at most.",
    ),
    "--min-length": ({"type": int, "default": 64, "metavar": "N"}, "Tokens of a chunk, at least."),
    "--suffix-length": (
        {"type": int, "default": 128, "metavar": "N"},
        "Tokens of the true text behind a place, at most.",
    ),
    "--start-mark": ({"default": "<think>", "metavar": "TEXT"}, "Written before a thought, as plain text."),
    "--end-mark": ({"default": "</think>", "metavar": "TEXT"}, "Written behind it."),
}
THINK_FLAGS: Flags = {
    "--think-temperature": ({"type": float, "default": 0.7}, "Sampling of the teacher's answers."),
    "--think-top-p": ({"type": float, "default": 1.0}, "Nucleus of that sampling."),
    "--think-max-tokens": (
        {"type": int, "default": 8192, "metavar": "TOKENS"},
        "Of one answer, which repeats the chunk with its thoughts.",
    ),
}


def add_thoughts_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `thoughts`."""
    reading = {name: flag for name, flag in READ_FLAGS.items() if name not in NOT_READ}
    add_flags(parser.add_argument_group("documents"), reading)
    add_flags(parser.add_argument_group("chunks, places and marks"), CHUNK_FLAGS)
    add_flags(parser.add_argument_group("output"), {"--out": OUTPUT_FLAGS["--out"]})
    group = parser.add_argument_group("the teacher")
    add_teacher_flags(group)
    add_flags(group, THINK_FLAGS)
    add_flags(group, {name: JUDGE_FLAGS[name] for name in ("--judge-deadline", "--judge-concurrency", "--judge-cache")})
    parser.set_defaults(role="policy", judge_deadline=UNIT_SECONDS, teacher_timeout=CALL_SECONDS)
    parser.set_defaults(prefix_field=None, format=["sip"])


def thoughts_work(args: argparse.Namespace) -> ThoughtsWork:
    """What `thoughts` does. Raises UserError, naming the flag."""
    if not args.teacher_url:
        raise PrepareError("--teacher-url is needed: the model that inserts thoughts")
    thinking = ThinkingSettings(
        tokenizer=args.tokenizer,
        seq_length=args.seq_length,
        min_length=args.min_length,
        suffix_length=args.suffix_length,
        start_mark=args.start_mark,
        end_mark=args.end_mark,
    )
    writer = ThoughtSettings(
        client=client_settings(args, "teacher"),
        temperature=args.think_temperature,
        top_p=args.think_top_p,
        max_tokens=args.think_max_tokens,
        deadline_s=args.judge_deadline,
        seed=args.seed,
    )
    return ThoughtsWork(read_settings(args), output_settings(args, None), thinking, writer)
