"""Reasoning: which part of a model's output is its answer, and which was only thinking.

Some chat templates end the prompt inside a reasoning block (DeepSeek-R1, QwQ, Qwen3-Thinking: `<think>`), others leave it
to the model to open one, gpt-oss writes harmony's channels, and some servers separate reasoning by themselves. Whatever
is not known to be an answer is none. One pass over the text, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

HARMONY_FINAL = "<|channel|>final<|message|>"
"""What a harmony model's answer begins with after its template's generation prompt."""
CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_HARMONY_END = re.compile(r"<\|(?:end|return|call|start)\|>")

REASONING_MARK = re.compile(
    r"<(?P<end>/?)(?P<name>(?:\w{1,12}[:|])?(?:think(?:ing)?|thought|reasoning))>|(?P<square>\[/?THINK\])"
    r"|(?P<kimi>◁/?think▷)|(?P<gemma><\|channel>|<channel\|>)|<\|(?P<edge>start|begin|end)_(?:of_)?(?:thinking|thought)\|>",
    re.IGNORECASE,
)
"""The marks around reasoning: <think>, <thinking>, <reasoning>, <seed:think>; Mistral's, Kimi's, Gemma's and Cohere's."""
# What may be the beginning of a block at the end of a template's prompt, in whatever spelling.
_OPENING = re.compile(
    r"[<\[◁](?!/)[^<>\[\]◁▷\n]{0,40}(?:think|thought|reason)[^<>\[\]◁▷\n]{0,40}[>\]▷]|<\|channel>", re.IGNORECASE
)
_EDGES = {"start": "end", "START": "END", "begin": "end", "BEGIN": "END"}
_SWITCHED_OFF = re.compile(r"no_?think|non|off|disable|end|stop", re.IGNORECASE)
# Harmony whose marks the server has stripped: `analysisWe need to ...assistantfinalConclusion: ...`.
_STRIPPED_HARMONY = re.compile(r"\A\s*analysis(?=[^\W\d_])")
_STRIPPED_FINAL = "assistantfinal"


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """How a model reasons, as far as its tokenizer and chat template say.

    end: the mark that ends the reasoning block which the template leaves open, "" when it leaves none. closing: what ends
    that block at once, where an answer is begun for the model. unknown: a mark that seems to open reasoning, if how that ends
    is not known. harmony: it writes harmony's channels. special_marks: its
    marks are special tokens, which a server strips unless told otherwise.
    """

    end: str = ""
    closing: str = ""
    harmony: bool = False
    special_marks: bool = False
    unknown: str = ""

    @property
    def always(self) -> bool:
        """Whether every answer begins with reasoning, for which there must be tokens."""
        return self.harmony or self.end != "" or self.unknown != ""

    def answer_start(self, given: str = "") -> str:
        """What stands between the template and an answer that we begin, so that it is never begun inside reasoning.

        `given` is what the settings want there; it is kept where it closes the block by itself.
        """
        if self.harmony:
            return given or HARMONY_FINAL
        return given if not self.end or self.end in given else self.closing + given


UNKNOWN = ReasoningStyle()
"""Of a model whose template is not known, or leaves nothing open."""


def style_of(generation_prompt: str, special_tokens: Iterable[str], *, harmony: bool = False) -> ReasoningStyle:
    """The style of a model: `generation_prompt` is what its template puts after the user's message."""
    special = set(special_tokens)
    special_marks = harmony or any(REASONING_MARK.fullmatch(token) for token in special)
    opening = next(reversed(list(_OPENING.finditer(generation_prompt))), None)
    if harmony or opening is None:
        return ReasoningStyle(harmony=harmony, special_marks=special_marks)
    end = _end_of(opening[0])
    if end is None:
        last = generation_prompt.rstrip().endswith(opening[0]) and not _SWITCHED_OFF.search(opening[0])
        return ReasoningStyle(special_marks=special_marks, unknown=opening[0] if last else "")
    if end in generation_prompt[opening.end() :]:
        return ReasoningStyle(special_marks=special_marks)
    line_break = "\n" if generation_prompt.endswith("\n") else ""
    return ReasoningStyle(end, f"{line_break}{end}\n\n", special_marks=special_marks or end in special)


def _end_of(opening: str) -> str | None:
    """The mark that ends what `opening` begins, None when that is not known."""
    if opening.casefold() == "<|channel>":
        return "<channel|>"
    for edge, end in _EDGES.items():
        if edge in opening:
            return opening.replace(edge, end, 1)
    return None if opening[1] == "|" else opening[0] + "/" + opening[1:]


def own_answer(output: str, style: ReasoningStyle = UNKNOWN, *, begun: bool = False) -> str | None:
    """The part of a model's output that is its answer; None when it never got to one.

    It begins after the last reasoning, and there is none while reasoning is open. `begun`: we began the answer behind all
    reasoning, so that a mark in it means that it is no answer any more.
    """
    if begun:
        return None if CHANNEL in output or REASONING_MARK.search(output) else output
    if style.harmony or CHANNEL in output:
        return _harmony_answer(output)
    if _STRIPPED_HARMONY.match(output):
        _, found, answer = output.rpartition(_STRIPPED_FINAL)
        return answer if found else None
    if style.end:
        _, found, output = output.rpartition(style.end)
        if not found:
            return None
    return _after_blocks(output)


def _harmony_answer(output: str) -> str | None:
    """The last message, if it is in the final channel; its header may go on after the channel's name."""
    _, _, message = output.rpartition(CHANNEL)
    header, found, answer = message.partition(_MESSAGE)
    if not found or header.split("<")[0].strip() != "final":
        return None
    end = _HARMONY_END.search(answer)
    return answer[: end.start()] if end else answer


def _after_blocks(output: str) -> str | None:
    """What follows the last reasoning block; an end without a beginning ends one that the prompt began."""
    start, block = 0, ""
    for mark in REASONING_MARK.finditer(output):
        kind, ends = _kind_of(mark)
        if ends and block in ("", kind):
            start, block = mark.end(), ""
        elif not ends:
            block = block or kind
    return None if block else output[start:]


def _kind_of(mark: re.Match[str]) -> tuple[str, bool]:
    """(name of the block, whether the mark ends it)"""
    if mark["name"]:
        return mark["name"].casefold(), bool(mark["end"])
    if mark["edge"]:
        return "edge", mark["edge"].casefold() == "end"
    text = mark[0].casefold()
    return mark.lastgroup or "", "/" in text or text == "<channel|>"
