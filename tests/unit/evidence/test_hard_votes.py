"""evidence/hard_votes.py: the paper's votes of recorded groups, as a judge with a begun answer samples them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from aiohttp import web
from app_server import AppServer
from judge_cases import make_group
from tiny_tokenizer import byte_level_tokenizer

from evidence.asking import PAPER, settings
from evidence.hard_votes import voted

CHAT = "{% for m in messages %}<|im_end|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}assistant\n"
TOKENIZER = byte_level_tokenizer()
TOKENIZER.chat_template = CHAT
PAIRS = 4 * 3 // 2


class SamplingJudge:
    """Answers /generate with the option of higher q, or where `odd` says so with another token; `texts` of its prompts."""

    def __init__(self, odd: str | None = None) -> None:
        self.texts: list[str] = []
        self.asked: list[int] = []
        self.odd = odd

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling = body["sampling_params"]
        assert (sampling["max_new_tokens"], sampling["temperature"], sampling["top_p"]) == (1, 1.0, 0.6)
        text = TOKENIZER.decode(body["input_ids"])
        self.texts.append(text)
        self.asked.append(sampling["n"])
        first, second = map(float, re.findall(r"q=([\d.]+)", text))
        label = self.odd or ("1" if first > second else "2")
        [token] = TOKENIZER.encode(label, add_special_tokens=False)
        meta = {"finish_reason": {"type": "length", "length": 1}, "weight_version": "default"}
        result = {"output_ids": [token], "meta_info": {**meta, "output_token_logprobs": [[-0.5, token, None]]}}
        return web.json_response([result] * sampling["n"] if sampling["n"] > 1 else result)

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "default"})

    @property
    def server(self) -> AppServer:
        return AppServer({"POST /generate": self.generate, "GET /model_info": self.info})


@pytest.fixture(name="tokenizer", scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return str(folder)


async def test_five_votes_a_pair_in_turns_of_order_make_win_rates(tokenizer: str) -> None:
    groups = [make_group(index, [0.3, 0.1, 0.4, 0.2]) for index in range(2)]
    judge = SamplingJudge()
    async with judge.server as server:
        found = await voted(groups, settings(PAPER, server.url, tokenizer))
    assert found["scores"] == [pytest.approx([2 / 3, 0.0, 1.0, 1 / 3])] * 2
    assert sorted(judge.asked) == [2] * PAIRS * 2 + [3] * PAIRS * 2
    assert found["calls"] == 5 * PAIRS * 2
    assert found["prompt_tokens"] == sum(len(TOKENIZER.encode(t, add_special_tokens=False)) for t in judge.texts)
    assert found["counters"]["no-label"] == 0
    for verdicts in found["verdicts"]:
        pairs = [tuple(sorted(verdict[:2])) for verdict in verdicts]
        assert {pair: pairs.count(pair) for pair in pairs} == dict.fromkeys(itertools.combinations(range(4), 2), 5)
    assert all(text.endswith("Conclusion: Option ") for text in judge.texts)  # begun, as in training


async def test_what_is_no_label_is_asked_once_more_and_then_leaves_no_score(tokenizer: str) -> None:
    judge = SamplingJudge(odd="x")
    async with judge.server as server:
        found = await voted([make_group(0, [0.1, 0.2])], settings(PAPER, server.url, tokenizer))
    assert found["scores"] == [None]
    assert found["calls"] == found["counters"]["no-label"] == sum(judge.asked)
    assert len(judge.asked) == 4  # two orders of the pair, twice
