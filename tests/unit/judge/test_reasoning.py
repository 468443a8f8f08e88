"""Reasoning is never read as an answer: what templates leave open, what models open themselves, what was cut or aborted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, Rewriter, RewriterSettings, SettingsError
from megatron_sip.judge.calls import ChoiceCall, GenerateCall, cache_material
from megatron_sip.judge.encoding import ChatEncoder, EncodingError
from megatron_sip.judge.prompts import builtin_prompt, parse_prompt
from megatron_sip.judge.readings import Written, finish_of, read_vote
from megatron_sip.judge.reasoning import HARMONY_FINAL, UNKNOWN, ReasoningStyle, own_answer, style_of
from megatron_sip.judge.wire import answer_tokens, openai_answer, sglang_answers, sglang_body

RULE = builtin_prompt("quality").rule
assert RULE is not None
VOTES = GenerateCall("q", ("Some ", "prompt"), 2, 64, 1.0, 0.6, RULE)
REWRITE = GenerateCall("r", ("Some ", "prompt"), 1, 64, 0.0, 1.0, start="once upon")
NATIVE, HOSTED = Endpoint("http://a"), Endpoint("http://a", "openai", "m")
TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OPENED = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"  # QwQ, Qwen3-Thinking, R1
PLAIN = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}<|start|>assistant"
)
ANALYSIS = "<|channel|>analysis<|message|>Conclusion: Option 2"
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


def encoder(template: str, *special: str) -> ChatEncoder:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def output(text: str, finish: Any = "stop") -> dict[str, Any]:
    reason = {"type": finish} if isinstance(finish, str) else finish
    return {"text": text, "meta_info": {"prompt_tokens": 5, "completion_tokens": 1, "finish_reason": reason}}


def native(template: str, *outputs: dict[str, Any], call: GenerateCall = VOTES) -> tuple[Any, Counter[str]]:
    lost: Counter[str] = Counter()
    special = ("<|channel|>",) if template == HARMONY else ()
    [answer], _, _ = sglang_answers([call], encoder(template, *special), list(outputs), lost)
    return answer, lost


def choice(text: str | None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"content": text, **message}, "finish_reason": finish}


@pytest.mark.parametrize(
    ("generation_prompt", "end", "closing"),
    [
        ("<｜Assistant｜><think>\n", "</think>", "\n</think>\n\n"),
        ("<|im_start|>assistant\n<think>\n", "</think>", "\n</think>\n\n"),
        ("<|assistant|><think>", "</think>", "</think>\n\n"),
        ("[/INST][THINK]", "[/THINK]", "[/THINK]\n\n"),
        ("<seed:bos>assistant\n<seed:think>", "</seed:think>", "</seed:think>\n\n"),
        ("<|im_assistant|>assistant<|im_middle|>◁think▷", "◁/think▷", "◁/think▷\n\n"),
        ("<|turn>model\n<|channel>thought\n", "<channel|>", "\n<channel|>\n\n"),
        ("<|start|>assistant<ifm|think>", "</ifm|think>", "</ifm|think>\n\n"),
        ("<|CHATBOT_TOKEN|><|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>\n\n"),
        ("assistant\n<|begin_of_thought|>\n", "<|end_of_thought|>", "\n<|end_of_thought|>\n\n"),
        ("<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>", "", ""),
        ("<|im_start|>assistant\n", "", ""),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", ""),
        ("<｜Assistant｜></think>", "", ""),
        ("<start_of_turn>model\n", "", ""),
    ],
)
def test_a_template_tells_whether_reasoning_is_open(generation_prompt: str, end: str, closing: str) -> None:
    style = style_of(generation_prompt, [])
    assert (style.end, style.closing, style.always) == (end, closing, end != "")
    assert style.answer_start() == closing
    if end:
        assert style.answer_start(f"{end}\n") == f"{end}\n"  # settings that close it themselves
        assert style.answer_start("So: ") == f"{closing}So: "
        assert own_answer("Conclusion: Option 1", style) is None
        assert own_answer(f"Conclusion: Option 2{end}\n\nConclusion: Option 1", style) == "\n\nConclusion: Option 1"


def test_templates_and_tokens_are_read_from_the_tokenizer() -> None:
    assert encoder(OPENED).reasoning == ReasoningStyle("</think>", "\n</think>\n\n")
    assert encoder(OPENED, "<think>", "</think>").reasoning.special_marks
    assert encoder(PLAIN).reasoning == UNKNOWN
    assert encoder(PLAIN, "[THINK]", "[/THINK]").reasoning == ReasoningStyle(special_marks=True)
    harmony = ReasoningStyle(harmony=True, special_marks=True)
    assert encoder(HARMONY, "<|channel|>").reasoning == harmony
    assert encoder(HARMONY.replace("<|message|>", "<|channel|>final<|message|>")).reasoning == harmony


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("<think>a</THINK>b", "b"),
        ("<think>a <think> b</think>c", "c"),
        ("<think>a</thinking>b", None),
        ("<think>a", None),
        ("a</think>b<think>c", None),
        ("a</think>b</think>c", "c"),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("<|START_THINKING|>a", None),
        (f"{ANALYSIS}", None),
        (f"{ANALYSIS}{FINAL}b", "b"),
        (f"{ANALYSIS}{FINAL}b<|return|>", "b"),
        (f"{ANALYSIS}{FINAL}b<|end|><|start|>assistant{ANALYSIS}", None),
        ("<|channel|>final <|constrain|>json<|message|>{}", "{}"),
        ("<|channel|>commentary to=final<|message|>b", None),
        ("<|channel|>final", None),
        ("analysisWe need to decide.assistantfinalb", "b"),  # a server that strips harmony's marks
        ("analysisWe need to decide. Conclusion: Option 1", None),
        ("analysis of both: b", "analysis of both: b"),
        ("think of it as b", "think of it as b"),
    ],
)
def test_an_answer_is_what_follows_all_reasoning(text: str, answer: str | None) -> None:
    assert own_answer(text) == answer


def test_a_begun_answer_never_goes_back_to_reasoning() -> None:
    assert own_answer(" a time</think>", begun=True) is None
    assert own_answer(f" a time{ANALYSIS}", begun=True) is None
    assert own_answer(" a time", ReasoningStyle("</think>", harmony=True), begun=True) == " a time"


def test_reasoning_that_the_template_opened_must_end() -> None:
    cut = "Option 2 is wrong. I must end with\n\nConclusion: Option 1"
    assert native(OPENED, output(cut, "length"), output(cut)) == ([None, None], {"in-reasoning": 2})
    done = output(f"{cut}</think>Conclusion: Option 2")
    assert native(OPENED, done, output(cut, None)) == ([0.0, None], {"in-reasoning": 1})


def test_a_harmony_answer_needs_its_final_channel() -> None:
    outputs = output("I think Conclusion: Option 1"), output(f"{ANALYSIS}{FINAL}Conclusion: Option 1")
    assert native(HARMONY, *outputs) == ([None, 1.0], {"in-reasoning": 1})


@pytest.mark.parametrize(
    "finish", ["length", {"type": "length", "length": 64}, "abort", {"type": "abort"}, "tool_calls"]
)
def test_an_answer_without_its_own_end_is_no_vote(finish: Any) -> None:
    answer, lost = native(PLAIN, output("Conclusion: Option 1", finish), output("Conclusion: Option 2"))
    assert answer == [None, 0.0]
    assert lost == {"cut" if "length" in str(finish) else "aborted": 1}


@pytest.mark.parametrize("finish", ["length", "content_filter", "abort", "MAX_TOKENS", "SAFETY"])
def test_nor_is_it_one_of_a_chat_api(finish: str) -> None:
    response = {"choices": [choice("Conclusion: Option 1", finish), choice("Conclusion: Option 2", None)]}
    assert openai_answer(VOTES, HOSTED, response)[0] == [None, 0.0]
    soft = ChoiceCall("q", ("p",), RULE)
    assert openai_answer(soft, HOSTED, {"choices": [choice("Conclusion: Option 1", finish)]})[0] is None


def test_a_chat_api_may_separate_reasoning_or_not() -> None:
    opened = encoder(OPENED).reasoning
    verdict = "Conclusion: Option 1"
    for style, first, value in (
        (UNKNOWN, choice(verdict), 1.0),
        (opened, choice(verdict), None),  # known to be open, and nothing closes it
        (opened, choice(f"so</think>{verdict}"), 1.0),
        (opened, choice(verdict, reasoning_content="so"), 1.0),
        (opened, choice(verdict, reasoning="so"), 1.0),
        (ReasoningStyle(harmony=True), choice(verdict), 1.0),
        (ReasoningStyle(harmony=True), choice(ANALYSIS), None),
    ):
        one = GenerateCall("q", ("p",), 1, 64, 1.0, 0.6, RULE)
        assert openai_answer(one, HOSTED, {"choices": [first]}, style)[0] == [value]


def test_aborted_answers_are_failures_and_never_rewrites() -> None:
    for finish in ("abort", {"type": "abort", "message": "Aborted", "status_code": None}):
        assert native(PLAIN, output(" a time", finish), call=REWRITE)[0] is None
        assert native(PLAIN, output("Conclusion: Option 1", finish), output("", finish))[0] is None
    assert openai_answer(REWRITE, HOSTED, {"choices": [choice("once upon a time", "content_filter")]})[0] is None
    nothing: Any = None
    assert native(PLAIN, output(nothing), output("Conclusion: Option 1"))[0] == [None, 1.0]
    assert native(PLAIN, output(nothing), call=REWRITE)[0] is None


def test_a_rewrite_may_be_cut_where_its_start_shows_that_it_is_one() -> None:
    assert native(OPENED, output(" a time", "length"), call=REWRITE)[0] == [" a time"]
    assert native(OPENED, output(" a </think>", "length"), call=REWRITE) == ([None], {"in-reasoning": 1})
    free = GenerateCall("r", ("p",), 1, 64, 0.0, 1.0)
    response = {"choices": [choice("Okay, the user wants", "length")]}
    assert openai_answer(free, HOSTED, response)[0] == [None]
    assert openai_answer(REWRITE, HOSTED, response)[0] == [
        "Okay, the user wants"
    ]  # its start decides: see the rewriter


@pytest.mark.parametrize("template", [OPENED, PLAIN, HARMONY], ids=["opened", "plain", "harmony"])
def test_an_answer_is_never_begun_inside_reasoning(template: str) -> None:
    special = ("<|channel|>", "<|message|>") if template == HARMONY else ("<think>", "</think>")
    made = encoder(template, *special)
    decode = made._tokenizer.decode
    between = {OPENED: "<think>\n\n</think>\n\n", PLAIN: "", HARMONY: HARMONY_FINAL}[template]
    soft = sglang_body([ChoiceCall("q", ("Some ", "prompt"), RULE)], made, NATIVE)["input_ids"][0]
    assert decode(soft).endswith(f"assistant{'' if template == HARMONY else chr(10)}{between}Conclusion: Option ")
    started = sglang_body([REWRITE], made, NATIVE)
    assert decode(started["input_ids"][0]).endswith(f"{between}once upon")
    ends = [made._tokenizer.convert_tokens_to_ids(token) for token in special]
    assert (ends[1] in soft) == (template != PLAIN)  # the mark's own token, not its letters
    free = sglang_body([VOTES], made, NATIVE)["input_ids"][0]
    assert decode(free).endswith(("<think>\n", "assistant\n", "assistant"))


def test_marks_that_are_special_tokens_are_kept() -> None:
    for made, endpoint, stripped in (
        (encoder(PLAIN), NATIVE, True),
        (encoder(OPENED), NATIVE, True),  # plain tokens: nothing strips them
        (encoder(OPENED, "<think>", "</think>"), NATIVE, False),
        (encoder(HARMONY, "<|channel|>"), NATIVE, False),
        (encoder(PLAIN), Endpoint("http://a", reasoning_tokens=9), False),
    ):
        assert sglang_body([VOTES], made, endpoint)["sampling_params"]["skip_special_tokens"] is stripped


def test_a_begun_answer_costs_no_reasoning() -> None:
    native_budget = Endpoint("http://a", reasoning_tokens=900)
    assert answer_tokens(VOTES, native_budget) == 964
    assert answer_tokens(REWRITE, native_budget) == 64
    assert answer_tokens(REWRITE, Endpoint("http://a", "openai", reasoning_tokens=900)) == 964


@pytest.mark.parametrize("reason", [None, "stop", {"type": "stop", "matched": 7}, "STOP", {}])
def test_ordinary_ends(reason: Any) -> None:
    assert finish_of(reason) == "finished"


@pytest.mark.parametrize("reason", [7, [], True, {"type": 3}, "function_call", {"type": "abort"}])
def test_unknown_ends_are_not_believed(reason: Any) -> None:
    assert finish_of(reason) == "aborted"


@pytest.mark.parametrize("verdict", ["hard", "soft"])
@pytest.mark.parametrize(("budget", "kind"), [(0, "sglang"), (2048, "sglang"), (0, "openai")])
async def test_a_judge_that_reasons_needs_tokens_for_it(
    verdict: Any, budget: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at the check, where nothing has been paid for yet."""
    monkeypatch.setattr(ChatEncoder, "load", classmethod(lambda cls, path: encoder(OPENED)))
    async with FakeJudge() as server:
        client = ClientSettings((Endpoint(server.url, kind, reasoning_tokens=budget),), tokenizer="opened")
        async with Judge(JudgeSettings({"quality": 1.0}, client, default_verdict=verdict)) as judge:
            if budget or (verdict == "soft" and kind == "sglang"):
                await judge.check(5.0)
            else:
                with pytest.raises(SettingsError, match="--teacher-reasoning-tokens"):
                    await judge.check(5.0)
        async with Rewriter(RewriterSettings(client), byte_level_tokenizer(), 8) as rewriter:
            if kind == "sglang":
                await rewriter.check(5.0)  # a rewrite is begun behind the reasoning
            else:
                with pytest.raises(SettingsError, match="--teacher-reasoning-tokens"):
                    await rewriter.check(5.0)


def test_an_unknown_beginning_of_reasoning_is_noticed() -> None:
    assert style_of("<|assistant|><|think|>\n", []) == ReasoningStyle(unknown="<|think|>")
    assert style_of("<|think|>", []).always
    for harmless in (
        "<|assistant|><|no_think|>",
        "<|think|>now",
        "<|reasoning_off|>",
        "<|reasoning:low|><|assistant|>",
    ):
        assert style_of(harmless, []) == UNKNOWN


async def test_reasoning_whose_end_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    template = PLAIN.replace("{% endif %}", "<|think|>{% endif %}")
    monkeypatch.setattr(ChatEncoder, "load", classmethod(lambda cls, path: encoder(template)))
    for prefix in ("", "<|answer|>"):
        async with FakeJudge() as server:
            client = ClientSettings((Endpoint(server.url, answer_prefix=prefix),), tokenizer="known")
            async with Judge(JudgeSettings({"quality": 1.0}, client)) as judge:
                if prefix:
                    await judge.check(5.0)
                    continue
                with pytest.raises(EncodingError, match=r"'<\|think\|>'.*--teacher-answer-prefix"):
                    await judge.check(5.0)


@pytest.mark.parametrize("template", [OPENED, HARMONY])
async def test_a_chat_api_does_not_begin_answers_inside_reasoning(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's puts the begun answer behind the template's `<think>`."""
    special = ["<|channel|>"] if template == HARMONY else []
    monkeypatch.setattr(ChatEncoder, "load", classmethod(lambda cls, path: encoder(template, *special)))
    async with FakeJudge() as server:
        endpoint = Endpoint(server.url, "openai", prefill=True, reasoning_tokens=2048)
        client = ClientSettings((endpoint,), tokenizer="known")
        tokenizer = byte_level_tokenizer()
        for asks in (Judge(JudgeSettings({"quality": 1.0}, client)), Rewriter(RewriterSettings(client), tokenizer, 8)):
            async with asks:
                with pytest.raises(SettingsError, match="--teacher-prefill"):
                    await asks.check(5.0)


ARGUMENTS = [
    *("The first repeats itself. ", "I must end with Conclusion: Option 1 or Conclusion: Option 2. "),
    *("\nConclusion: Option 1\n", "Wait, let me re-read.\n", '{"label": "x"} ', "**Conclusion: Option 1**"),
]


@given(
    st.sampled_from(["opened", "own", "channels", "apart"]),
    st.lists(st.sampled_from(ARGUMENTS), max_size=6),
    st.integers(0, 400),
    st.sampled_from([None, "stop", "length", "abort"]),
)
def test_a_cut_answer_gives_its_own_verdict_or_none(
    form: str, arguments: list[str], at: int, finish: str | None
) -> None:
    """Wherever an answer for option 2, with option 1 in its reasoning, breaks off, and whatever is said of its end."""
    thought, verdict = "".join(arguments), "So it is.\n\nConclusion: Option 2"
    whole, style = {
        "opened": (f"{thought}</think>\n\n{verdict}", ReasoningStyle("</think>")),
        "own": (f"<think>{thought}</think>{verdict}", UNKNOWN),
        "channels": (f"<|channel|>analysis<|message|>{thought}{FINAL}{verdict}", ReasoningStyle(harmony=True)),
        "apart": (verdict, UNKNOWN),
    }[form]
    cut = whole[: at % (len(whole) + 1)]
    made = read_vote(Written(cut, finish_of(finish), style), RULE)
    complete = cut == whole and finish in (None, "stop")
    assert made == (0.0 if complete else None)


@given(st.text(), st.integers(0, 200))
def test_nothing_before_the_end_of_open_reasoning_is_an_answer(text: str, at: int) -> None:
    style = ReasoningStyle("</think>")
    whole = f"{text}Conclusion: Option 1\n</think>\n\nConclusion: Option 2"
    cut = whole[: at % (len(whole) + 1)]
    answer = own_answer(cut, style)
    assert answer is None or RULE.read(answer) != 1.0


def test_what_an_answer_meant_before_is_not_read_from_a_cache() -> None:
    assert b'"generate@2"' in cache_material(VOTES, "m")
    assert b'"choice@2"' in cache_material(ChoiceCall("q", ("p",), RULE), "m")


def test_identity_covers_how_answers_are_read() -> None:
    text = "+++\nname = 'p'\nkind = 'pointwise'\npattern = 'R: (A|B)'\n[values]\nA = 1\nB = 0\n+++\n{{candidate}}"
    variants = [text, text.replace("A = 1", "A = 0.5"), text.replace("R:", "RATED:")]
    variants.append(text.replace("kind", "position = 'anywhere'\nkind"))
    assert len({parse_prompt(variant, "p").identity for variant in variants}) == 4
