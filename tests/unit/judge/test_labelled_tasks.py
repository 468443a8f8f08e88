"""Labelled records as tasks: what the policy is asked in training is what a judge or rewriter is asked, id for id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from app_server import AppServer
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.errors import DataError
from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, Rewriter, RewriterSettings
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_tasks import LabelledSettings, make_writer
from megatron_sip.records import Candidate, Group, Judgement, Rewriting, Task, Thinking

TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
SEED = 5
PREFIX = "Größe and naïve café: the quick brown fox <|im_end|> jumps over the lazy dog, again and again."
RECORDS: dict[str, dict[str, Any]] = {
    "quality": {
        **{
            "criterion": "quality",
            "verdict": "2",
            "prefix": PREFIX,
            "suffix": " and so on",
            "pair": "a",
            "subset": "s",
        },
        **{"option_1": " Straße!", "option_2": " and so on"},
    },
    "safety": {"criterion": "safety", "verdict": "NO", "prefix": PREFIX, "suffix": "", "candidate": " bites 🙂"},
    "factuality:v4": {
        **{"criterion": "factuality:v4", "verdict": "No", "prefix": PREFIX, "suffix": " x"},
        "candidate": " y",
    },
}


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = byte_level_tokenizer()
    made.chat_template = template
    return made


MADE = tokenizer()
FRAMES = {"judgements": 1130, "rewrites": 990}
"""About as many tokens as these prompts have without their prefix."""


class Listens(AppServer):
    """An SGLang server that keeps what it is asked, and refuses it."""

    def __init__(self) -> None:
        super().__init__({"POST /generate": self._refuse, "GET /model_info": self._info, "GET /v1/models": self._info})
        self.prompts: list[list[int]] = []

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _refuse(self, request: web.Request) -> web.Response:
        self.prompts += (await request.json())["input_ids"]
        return web.Response(status=400, text="no")


@pytest.fixture(autouse=True)
def _known_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatEncoder, "load", classmethod(lambda cls, path: ChatEncoder(tokenizer())))


def client(server: Listens, context: int | None = None) -> ClientSettings:
    return ClientSettings((Endpoint(server.url, context_tokens=context),), tokenizer="known", attempts=1, seed=SEED)


def task_of(record: dict[str, Any], kind: Any = "judgements", **settings: Any) -> Task:
    made = LabelledSettings(kind, **({"max_prompt": 4000, "max_answer": 64, "seed": SEED} | settings))
    writer = make_writer(made, tokenizer())
    assert writer.fits(record)
    return writer.task(3, record)


async def asked_by_the_judge(record: dict[str, Any], mode: Any) -> list[list[int]]:
    """The prompts that a judge sends about a group of the record's texts."""
    options = [record[name] for name in ("option_1", "option_2", "candidate") if name in record]
    task = Task(0, [1], [2], record["prefix"], record["suffix"])
    group = Group(task, [Candidate("rollout", [place], text) for place, text in enumerate(options)])
    async with Listens() as server:
        settings = JudgeSettings({record["criterion"]: 1.0}, client(server), default_verdict=mode, votes=2)
        async with Judge(settings) as judge:
            await judge.check(5.0)
            await judge.score([group])
        return server.prompts


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("criterion", RECORDS)
async def test_a_judgement_s_prompt_is_what_the_judge_is_asked(criterion: str, mode: Any) -> None:
    record = RECORDS[criterion]
    made = task_of(record, default_verdict=mode)
    assert made.prefix_ids in await asked_by_the_judge(record, mode)
    assert made.label == Judgement(
        criterion, record["verdict"], mode == "soft", record.get("pair", ""), record.get("subset", "")
    )
    assert (made.suffix_ids, made.suffix_text) == ([], record["verdict"])
    end = tokenizer().decode(made.prefix_ids[-30:])
    assert end.endswith("assistant\n") == (mode == "hard")


async def test_both_orders_of_a_pair_are_asked_about_alike() -> None:
    record = RECORDS["quality"]
    flipped = record | {"option_1": record["option_2"], "option_2": record["option_1"], "verdict": "1"}
    prompts = await asked_by_the_judge(record, "soft")
    assert [task_of(record).prefix_ids in prompts, task_of(flipped).prefix_ids in prompts] == [True, True]
    assert task_of(record).prefix_ids != task_of(flipped).prefix_ids


@pytest.mark.parametrize("prefix", [PREFIX, "", "one word and white space \n\n"])
async def test_a_rewrite_s_prompt_is_what_the_rewriter_is_asked(prefix: str) -> None:
    record = {"prefix": prefix, "suffix": " then it sleeps.", "safe": True}
    async with Listens() as server:
        async with Rewriter(RewriterSettings(client(server), seed=SEED), tokenizer(), 64) as rewriter:
            await rewriter.check(5.0)
            await rewriter.rewrite([Task(0, [1], [2], prefix, record["suffix"])])
        made = task_of(record, "rewrites")
        assert server.prompts[0] == made.prefix_ids
    assert (made.prefix_text, made.suffix_text, made.label) == (prefix, record["suffix"], Rewriting(True, ""))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_long_prompt_loses_the_left_of_its_prefix_and_is_counted(mode: Any) -> None:
    words = " ".join(f"word{number}" for number in range(900))
    record = RECORDS["quality"] | {"prefix": words}
    whole = task_of(record, max_prompt=20_000, default_verdict=mode)
    limit = len(whole.prefix_ids) - 2000
    writer = make_writer(LabelledSettings("judgements", limit, 64, default_verdict=mode, seed=SEED), tokenizer())
    made = writer.task(0, record)
    assert limit - 60 < len(made.prefix_ids) <= limit
    assert "word899\n[end prefix" in made.prefix_text
    assert "word0 " not in made.prefix_text
    assert writer.counts["prompts-cut"] == 1
    kept = made.prefix_text.partition("[begin prefix ")[2][10:].partition("\n[end prefix")[0]
    assert words.endswith(kept)
    assert kept.startswith("word")


@given(prefix=st.text(max_size=1500), room=st.integers(30, 1500), seed=st.integers(0, 2**32))
def test_no_prompt_is_longer_than_told(prefix: str, room: int, seed: int) -> None:
    for record, kind in (
        (RECORDS["quality"], "judgements"),
        ({"suffix": " then it sleeps.", "safe": True}, "rewrites"),
    ):
        record = record | {"prefix": prefix}
        limit = FRAMES[kind] + room
        writer = make_writer(LabelledSettings(kind, limit, 64, seed=seed), MADE)
        if writer.fits(record):
            made = writer.task(0, record)
            assert len(made.prefix_ids) <= limit


def test_records_whose_texts_leave_no_room_are_left_out(tmp_path: Path) -> None:
    long = RECORDS["safety"] | {"candidate": "no end in sight " * 400}
    lines = [RECORDS["safety"], long]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    writer = make_writer(LabelledSettings("judgements", 2000, 64), tokenizer())
    source = LabelledSource(open_records([str(tmp_path / "a.jsonl")], "1", writer), "train", writer, 1)
    assert (len(source), source.report()["too_long"]) == (1, 1)
    with pytest.raises(ValueError, match="--max-prompt-length"):
        writer.task(0, long)


def test_a_suffix_that_no_answer_can_hold_is_cut_at_its_end() -> None:
    suffix = " again and again and again and again"
    assert task_of({"prefix": "a", "suffix": suffix, "safe": True}, "rewrites", max_answer=400).suffix_text == suffix
    made = task_of({"prefix": "a", "suffix": suffix, "safe": True}, "rewrites", max_answer=5)
    assert suffix.startswith(made.suffix_text)
    assert len(tokenizer().encode(made.suffix_text)) == 4  # and the token that ends it


@pytest.mark.parametrize(("begins_with", "max_prompt"), [(None, 400), (0, 400), (0, 40)])
def test_a_thought_s_prompt_is_the_plain_text_and_the_mark(begins_with: int | None, max_prompt: int) -> None:
    record = {"prefix": PREFIX * 2, "suffix": " A dog.", "start_mark": " <thought>", "end_mark": "</thought>"}
    made = task_of(record, "thoughts", begins_with=begins_with, max_prompt=max_prompt)
    plain = tokenizer().encode(PREFIX * 2 + " <thought>", add_special_tokens=False, split_special_tokens=True)
    expected = ([] if begins_with is None else [begins_with]) + plain
    assert made.prefix_ids == expected[-max_prompt:]
    assert (made.prefix_text, made.suffix_text) == (PREFIX * 2, " A dog.")
    assert made.label == Thinking("</thought>", "")


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (
            "judgements",
            RECORDS["quality"] | {"verdict": "3"},
            '"verdict" is \'3\'; a verdict of quality is one of "1", "2"',
        ),
        ("judgements", RECORDS["quality"] | {"option_2": None}, '"option_2" is missing; it must be a text'),
        ("judgements", RECORDS["safety"] | {"candidate": 7}, '"candidate" is 7; it must be a text'),
        ("judgements", RECORDS["safety"] | {"criterion": "beauty"}, "no prompt 'beauty'; there are: "),
        ("judgements", RECORDS["safety"] | {"criterion": "no/such.txt"}, "there is no such prompt file"),
        ("judgements", RECORDS["safety"] | {"criterion": "rewrite"}, "a prompt without verdicts"),
        ("rewrites", {"prefix": "a", "suffix": "b", "safe": "yes"}, "\"safe\" is 'yes'; it must be true or false"),
        ("rewrites", {"prefix": "a", "suffix": " ", "safe": True}, '"suffix" is empty'),
        ("thoughts", {"prefix": "a", "suffix": "b", "start_mark": ""}, '"end_mark" is missing'),
    ],
)
def test_wrong_fields_are_named_with_file_and_line(
    tmp_path: Path, kind: Any, record: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(record))
    with pytest.raises(DataError) as caught:
        open_records([str(path)], "1", make_writer(LabelledSettings(kind, 2000, 64), tokenizer()))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_soft_verdicts_that_begin_alike_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mood.txt"
    header = (
        "name = 'mood'\nkind = 'pointwise'\npattern = '(up|upper)'\nstart = 'MOOD: '\n[values]\nup = 1\nupper = 0\n"
    )
    path.write_text(f"+++\n{header}+++\n{{{{candidate}}}}\n")
    record = RECORDS["safety"] | {"criterion": str(path), "verdict": "up"}
    with pytest.raises(ValueError, match="begin alike: --judge-verdict"):
        make_writer(LabelledSettings("judgements", 2000, 64), tokenizer()).fits(record)


@pytest.mark.parametrize("kind", ["judgements", "rewrites"])
def test_a_policy_without_chat_template_is_refused(kind: Any) -> None:
    with pytest.raises(DataError, match="no chat template: start from a post-trained"):
        make_writer(LabelledSettings(kind, 2000, 64), tokenizer(None))
    make_writer(LabelledSettings("thoughts", 2000, 64), tokenizer(None))


def identity_of(kind: Any, record: dict[str, Any], **settings: Any) -> str:
    """Of the writer, once it has seen the record."""
    writer = make_writer(LabelledSettings(kind, **({"max_prompt": 4000, "max_answer": 64} | settings)), MADE)
    assert writer.fits(record)
    return writer.identity


def test_a_run_goes_on_where_its_tasks_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else was changed."""
    (tmp_path / "own.txt").write_text("+++\nname = 'own'\nkind = 'text'\n+++\n{{continuation}} {{first_words}}\n")
    (tmp_path / "other.txt").write_text("+++\nname = 'own'\nkind = 'text'\n+++\nDo {{continuation}} {{first_words}}\n")
    monkeypatch.chdir(tmp_path)
    rewrite = {"prefix": "some words", "suffix": " then it sleeps.", "safe": True}
    thought = {"prefix": "some words", "suffix": " so", "start_mark": "<t>", "end_mark": "</t>"}
    own = {"rewrite_prompt": Path("own.txt")}
    found = {
        "judge": identity_of("judgements", RECORDS["safety"]),
        "rewriter": identity_of("rewrites", rewrite, **own),
        "thinker": identity_of("thoughts", thought),
    }
    for same in ({"max_answer": 9}, {"begins_with": 1}, own, {"verdicts": {"quality": "hard"}}):
        assert identity_of("judgements", RECORDS["safety"], **same) == found["judge"]
    for same in (
        {"rewrite_prompt": tmp_path / "own.txt"},
        {**own, "default_verdict": "hard"},
        {**own, "begins_with": 1},
    ):
        assert identity_of("rewrites", rewrite, **same) == found["rewriter"]
    for same in ({"max_answer": 9}, own, {"default_verdict": "hard"}, {"prefix_chars": 7}, {"seed": 7}):
        assert identity_of("thoughts", thought, **same) == found["thinker"]
    changed = [
        *(identity_of("judgements", RECORDS["safety"], **{"default_verdict": "hard"}), found["judge"]),
        *(
            identity_of("judgements", RECORDS["safety"], **{name: 3999})
            for name in ("max_prompt", "prefix_chars", "seed")
        ),
        *(identity_of("rewrites", rewrite), identity_of("rewrites", rewrite, rewrite_prompt=Path("other.txt"))),
        *(identity_of("rewrites", rewrite, **own, max_answer=9), found["rewriter"]),
        *(identity_of("thoughts", thought, max_prompt=9 + 60), identity_of("thoughts", thought, begins_with=1)),
    ]
    assert len({*changed, found["thinker"]}) == len(changed) + 1
