"""The commands behind their flags: settings in, the manifest of what was prepared out."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_sip.judge.corruption import Corruptor
from megatron_sip.judge.judge import Judge
from megatron_sip.judge.settings import ClientSettings
from megatron_sip.prepare.groups import GroupMaker, JudgedTask, group_source
from megatron_sip.prepare.judgements import QualityMaker
from megatron_sip.prepare.labels import (
    KnownLabels,
    Labeller,
    LabelMaker,
    ToRecord,
    UnanimousVotes,
    rewrite_record,
    safety_record,
)
from megatron_sip.prepare.pieces import Cutter
from megatron_sip.prepare.pipeline import document_source, prepare
from megatron_sip.prepare.settings import (
    CutSettings,
    GroupSettings,
    OutputSettings,
    QualitySettings,
    ReadSettings,
    VoteSettings,
)


@dataclass(frozen=True, slots=True)
class QualityWork:
    """Records of quality judgements."""

    reading: ReadSettings
    cutting: CutSettings
    output: OutputSettings
    quality: QualitySettings


@dataclass(frozen=True, slots=True)
class LabelWork:
    """Records of suffixes that are safe or not. votes: None where the documents say it themselves."""

    task: Literal["judgements", "rewrites"]
    reading: ReadSettings
    cutting: CutSettings
    output: OutputSettings
    votes: VoteSettings | None


@dataclass(frozen=True, slots=True)
class GroupWork:
    """Records of a run's own groups. votes: None where the recorded verdicts count."""

    task: JudgedTask
    groups: GroupSettings
    output: OutputSettings
    votes: VoteSettings | None


async def prepare_quality(work: QualityWork) -> dict[str, Any]:
    """The manifest. Raises PrepareError, DataError, and the corruptor's errors."""
    cutter, quality = Cutter(work.cutting), work.quality
    async with AsyncExitStack() as stack:
        corruptor = None
        if quality.corruptor is not None:
            client = cached(quality.corruptor.client, work.output)
            corruptor = await stack.enter_async_context(Corruptor(replace(quality.corruptor, client=client)))
        made_by: dict[str, Any] = {"cutting": asdict(work.cutting), "rules": list(quality.rules), "seed": quality.seed}
        made_by["criterion"] = quality.criterion
        if quality.corruptor is not None:
            made_by["teacher"] = asked(asdict(quality.corruptor))
        make = QualityMaker(cutter, quality, corruptor)
        return await prepare(document_source(work.reading), work.output, "judgements", make, made_by, corruptor)


async def prepare_labels(work: LabelWork) -> dict[str, Any]:
    """The manifest. Raises PrepareError, DataError, and the judge's errors."""
    to_record: ToRecord = safety_record if work.task == "judgements" else rewrite_record
    cutter, seed = Cutter(work.cutting), work.reading.seed
    made_by: dict[str, Any] = {"cutting": asdict(work.cutting), "seed": seed}
    async with AsyncExitStack() as stack:
        labeller: Labeller = KnownLabels()
        judge = None
        if work.votes is not None:
            judge = await opened_judge(stack, work.votes, work.output)
            labeller = UnanimousVotes(judge, work.votes.judge.votes, seed)
            made_by["judge"] = asked(asdict(work.votes.judge))
        make = LabelMaker(cutter, labeller, to_record, seed)
        return await prepare(document_source(work.reading), work.output, work.task, make, made_by, judge)


async def prepare_groups(work: GroupWork) -> dict[str, Any]:
    """The manifest. Raises PrepareError, DataError, and the judge's errors."""
    made_by: dict[str, Any] = {"task": work.task}
    source = group_source(work.groups)
    async with AsyncExitStack() as stack:
        judge = None
        if work.votes is not None:
            judge = await opened_judge(stack, work.votes, work.output)
            made_by["judge"] = asked(asdict(work.votes.judge))
        make = GroupMaker(work.groups, work.task, judge)
        return await prepare(source, work.output, "judgements", make, made_by, judge)


async def opened_judge(stack: AsyncExitStack, votes: VoteSettings, output: OutputSettings) -> Judge:
    """A judge that is still to be checked. Raises SettingsError."""
    assert votes.judge.client is not None, "its criteria are asked of servers"
    client = cached(votes.judge.client, output)
    return await stack.enter_async_context(Judge(replace(votes.judge, client=client)))


def cached(client: ClientSettings, output: OutputSettings) -> ClientSettings:
    """A client that keeps its answers with the records, where the user names no other place: what was answered before a kill
    is not asked again."""
    return client if client.cache_path is not None else replace(client, cache_path=output.folder / ".answers.sqlite")


def asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a judge's or corruptor's settings what its answers depend on: not where it runs, nor how fast it is asked."""
    client = settings["client"]
    kept = {name: value for name, value in settings.items() if name not in ("client", "deadline_s", "audit_rate")}
    endpoint = {
        name: client["endpoints"][0][name] for name in ("model", "reasoning_tokens", "answer_prefix", "prefill")
    }
    return kept | endpoint | {"seed": client["seed"]}
