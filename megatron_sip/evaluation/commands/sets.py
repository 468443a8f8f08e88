"""The public sets of prompts that `generate --set` reads."""

from __future__ import annotations

import argparse

from megatron_sip.evaluation.suites.prompt_sets import PROMPT_SETS

ABOUT = "which sets of prompts generate reads, what file each wants and where it is published"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(given: argparse.Namespace) -> None:
    """Print them."""
    for name, found in PROMPT_SETS.items():
        print(f"{name}: {found.about}")
        print(
            f"    file: {found.file}\n    columns: {found.columns}\n    from: {found.published}\n    then: {found.judged_by}"
        )
    print("truthfulqa_mc1, truthfulqa_mc2 and the standard tasks: `megatron-sip-evaluate tasks`")
