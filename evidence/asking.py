"""One judging protocol on recorded groups: its scores, and what it cost.

    python -m evidence.asking GROUPS_DIR --protocol NAME --url http://host:30000 --tokenizer HF_DIR --save FILE.json

The server's cache of prefixes is emptied before, so that no protocol finds what another one left there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.hard_votes import voted
from megatron_sip.evaluation.served_model import load_tokenizer
from megatron_sip.experience.recording import group_files, groups_in
from megatron_sip.files import write_atomically
from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, ScheduleSettings
from megatron_sip.judge.settings import VerdictMode
from megatron_sip.records import Group
from megatron_sip.serving.blocking_call import call

QUALITY = "examples/short_quality.txt"
LIKELIHOOD = "likelihood"
EVERYTHING = "all pairs"
PAPER = "all pairs, 5 hard votes (paper)"
CALL_TIMEOUT_S = 900.0
"""Two cores take minutes for what is asked of them at once."""
PROTOCOLS: Mapping[str, ScheduleSettings] = {
    PAPER: ScheduleSettings("all_pairs"),
    EVERYTHING: ScheduleSettings("all_pairs"),
    "default, both orders": ScheduleSettings(both_orders=True),
    "default": ScheduleSettings(),
    "32 calls": ScheduleSettings("two_ended_bt", budget=32),
    "suffix as pivot": ScheduleSettings("pivot", pivot_competes=True),
}
"""Of the pairwise judge; its verdicts are soft but for the PAPER's, and of all pairs and the pivot in both orders."""


def settings(protocol: str, url: str, tokenizer: str) -> JudgeSettings:
    """The judge that asks by a protocol, LIKELIHOOD among them."""
    client = ClientSettings((Endpoint(url),), tokenizer, call_timeout_s=CALL_TIMEOUT_S)
    if protocol == LIKELIHOOD:
        return JudgeSettings({LIKELIHOOD: 1.0}, client, audit_rate=0.0, deadline_s=3600.0)
    # Votes, temperature and nucleus are by default the paper's.
    mode: VerdictMode = "hard" if protocol == PAPER else "soft"
    return JudgeSettings(
        {QUALITY: 1.0},
        client,
        schedule=PROTOCOLS[protocol],
        default_verdict=mode,
        audit_rate=0.0,
        deadline_s=3600.0,
    )


def unjudged(groups: Sequence[Group]) -> list[Group]:
    """The groups as they were before they were judged, each text once: equal ones would share their verdicts."""
    cleared = []
    for group in groups:
        distinct = {candidate.text: candidate for candidate in reversed(group.candidates)}
        kept = [candidate for candidate in group.candidates if distinct[candidate.text] is candidate]
        cleared.append(Group(group.task, kept))
    return cleared


async def asked(groups: Sequence[Group], how: JudgeSettings, document_end: int | None) -> dict[str, Any]:
    """Scores and verdicts of each group, calls, tokens of prompts, seconds."""
    async with Judge(how, document_end) as judge:
        await judge.check()
        started = time.monotonic()
        judged = await judge.score(groups)
        seconds = time.monotonic() - started
        counters = judge.counters()
        return {
            "kinds": [[candidate.kind for candidate in group.candidates] for group in judged],
            "scores": [group.scores for group in judged],
            "verdicts": [next(iter(group.verdicts.values()), []) for group in judged],
            "calls": counters["calls"],
            "prompt_tokens": counters.get("prompt-tokens", 0),
            "seconds": round(seconds, 2),
            "counters": counters,
        }


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", type=Path, help="what a run recorded with --save-groups")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, LIKELIHOOD), required=True)
    parser.add_argument("--url", required=True, help="an SGLang server of the judge")
    parser.add_argument("--tokenizer", required=True, help="HF folder of its tokenizer, which is the policy's too")
    parser.add_argument("--save", type=Path, required=True, help="JSON file to write")
    return parser


def main() -> None:
    given = command_line().parse_args()
    recorded = [group for path in group_files(given.groups) for group in groups_in(path) if group.dropped is None]
    call(given.url, "POST", "/flush_cache", timeout_s=60)
    end = load_tokenizer(given.tokenizer).eos_token_id
    groups, how = unjudged(recorded), settings(given.protocol, given.url, given.tokenizer)
    found = asyncio.run(voted(groups, how) if given.protocol == PAPER else asked(groups, how, end))
    given.save.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given.save, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
