"""A record as other trainers want it: the filled prompt as a chat message, and the right answer.

verl (`examples/data_preprocess/` there): one row has data_source, prompt [{role, content}], ability, reward_model {style,
ground_truth}, extra_info. NeMo-Gym: a line has responses_create_params {input: [{role, content}]} and what a resources server
verifies with; `agent_ref` is added by its own `gym dataset collate`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from megatron_sip.judge.labelled_tasks import judge_prompt
from megatron_sip.judge.prompts import PromptFile, builtin_prompt, fence_code, valid_unicode
from megatron_sip.judge.rewriter import last_words, rewrite_call

Record = Mapping[str, Any]
SHOWN = ("prefix", "suffix", "candidate", "option_1", "option_2")
VERL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("split", pa.string()),
                    ("subset", pa.string()),
                    ("pair", pa.string()),
                    ("safe", pa.bool_()),
                    ("suffix", pa.string()),
                ]
            ),
        ),
    ]
)


def verl_row(record: Record, index: int, seed: int, rewriter: PromptFile | None = None) -> dict[str, Any]:
    """A row of VERL_SCHEMA. ground_truth: the right verdict's label; of a rewrite the suffix, which a safe one copies."""
    extra = {name: record.get(name) for name in ("split", "subset", "pair", "safe", "suffix")}
    return {
        "data_source": f"megatron_sip/{_ability(record)}",
        "prompt": chat(record, seed, rewriter),
        "ability": "judging" if "verdict" in record else "rewriting",
        "reward_model": {"style": "model" if record.get("safe") is False else "rule", "ground_truth": _answer(record)},
        "extra_info": {"index": index, **extra},
    }


def nemo_gym_line(record: Record, seed: int, rewriter: PromptFile | None = None) -> dict[str, Any]:
    """The line of a record. template_metadata.output_regex finds the label in a judge's answer, as for its mcqa server."""
    line = {
        "responses_create_params": {"input": chat(record, seed, rewriter)},
        "expected_answer": _answer(record),
        "metadata": {name: record[name] for name in ("subset", "pair", "safe") if name in record},
    }
    if "criterion" in record:
        rule = judge_prompt(record["criterion"]).rule
        assert rule is not None
        line["template_metadata"] = {"output_regex": regex_of(rule.pattern), "template_id": record["criterion"]}
    return line


def regex_of(pattern: re.Pattern[str]) -> str:
    """The pattern with its flags inside, as whoever compiles it has none."""
    flags = "".join(letter for letter in "imsx" if pattern.flags & re.RegexFlag[letter.upper()])
    bare = re.sub(r"^\(\?[aiLmsux]+\)", "", pattern.pattern)
    return f"(?{flags}){bare}" if flags else bare


def chat(record: Record, seed: int, rewriter: PromptFile | None = None) -> list[dict[str, str]]:
    """The user's message of a judgement or a rewrite, as judge and rewriter are asked; the latter by its own prompt, if any."""
    if "verdict" in record:
        texts = {name: valid_unicode(record[name]) for name in SHOWN if name in record}
        texts["reference"] = texts.pop("suffix", "")
        code = fence_code(seed, texts["prefix"], [text for name, text in texts.items() if name != "prefix"])
        pieces = judge_prompt(record["criterion"]).fill(texts, code)
    else:
        prefix = valid_unicode(record["prefix"])
        prompt = rewriter or builtin_prompt("rewrite")
        pieces = rewrite_call(prompt, prefix, record["suffix"], last_words(prefix), seed).prompt
    return [{"role": "user", "content": "".join(pieces)}]


def _ability(record: Record) -> str:
    return str(record.get("criterion", "rewrite"))


def _answer(record: Record) -> str:
    return str(record["verdict"] if "verdict" in record else record["suffix"])
