"""The flags of `python -m megatron_sip.prepare prefixes`, and what it is told by them."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from megatron_sip.config.flags import JUDGE_FLAGS, Flags, add_flags, add_teacher_flags
from megatron_sip.config.prepare_flags import (
    CALL_SECONDS,
    CUT_FLAGS,
    LABEL_FLAGS,
    OUTPUT_FLAGS,
    READ_FLAGS,
    UNIT_SECONDS,
    VERDICT_FLAGS,
    VOTES_TOP_P,
    WRITTEN,
    cut_settings,
    output_settings,
    read_settings,
    vote_settings,
)
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.data.roles import SPLITS
from megatron_sip.prepare.prefixes import KEEPS, PrefixesWork
from megatron_sip.prepare.settings import PrepareError

log = logging.getLogger(__name__)

PREFIX_FLAGS: Flags = {
    "--samples": ({"type": int, "required": True, "metavar": "N"}, "Tasks that are wanted (paper: 1000)."),
    "--keep": (
        {"choices": KEEPS, "required": True},
        "Prefixes that all votes call unsafe, or safe; any: all of them, and no judge is asked.",
    ),
    "--part": ({"choices": SPLITS, "default": "test"}, "Split whose documents are cut."),
    "--votes": LABEL_FLAGS["--votes"],
}


def add_prefixes_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `prefixes`."""
    add_flags(parser.add_argument_group("tasks"), PREFIX_FLAGS)
    add_flags(parser.add_argument_group("documents"), READ_FLAGS)
    cutting = {name: flag for name, flag in CUT_FLAGS.items() if name != "--no-cut"}
    add_flags(parser.add_argument_group("how they are cut"), cutting)
    add_flags(parser.add_argument_group("output"), {"--out": OUTPUT_FLAGS["--out"]})
    group = parser.add_argument_group("the judge that votes")
    add_teacher_flags(group)
    add_flags(group, {name: JUDGE_FLAGS[name] for name in (*VERDICT_FLAGS, "--judge-cache")})
    parser.set_defaults(role="policy", no_cut=False, format=["sip"])
    parser.set_defaults(judge_deadline=UNIT_SECONDS, teacher_timeout=CALL_SECONDS, judge_top_p=VOTES_TOP_P)


def prefixes_work(args: argparse.Namespace) -> PrefixesWork:
    """What `prefixes` does. Raises UserError, naming the flag."""
    if args.samples < 1:
        raise PrepareError(f"--samples {args.samples}: at least 1 is needed")
    if args.keep == "any":
        refuse_unused(args, add_prefixes_flags, ("--votes", "--teacher-url", *WRITTEN), "with --keep any")
    elif not args.teacher_url:
        raise PrepareError(f"--teacher-url is needed with --keep {args.keep}: the judge who votes")
    if not any(Path(entry).is_dir() for entry in args.data_path or ()):
        log.warning(
            "prefixes: --data-path is of plain files, whose %s documents are told by their text here and by their place in "
            "training: a run on the same files learns most of them. For held-out prefixes divide the files by `roles` first, "
            "and train with --subset policy",
            args.part,
        )
    return PrefixesWork(
        keep=args.keep,
        samples=args.samples,
        reading=replace(read_settings(args), split=args.part),
        cutting=cut_settings(args),
        output=output_settings(args, None),
        votes=None if args.keep == "any" else vote_settings(args, "safety"),
    )
