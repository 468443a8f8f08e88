"""Diversity on texts whose n-grams can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.evaluate import main
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import FORMAT
from megatron_sip.evaluation.results import read_results


def test_counts_by_hand() -> None:
    found = diversity(["a b a b a b", "C, d"])
    assert found["distinct_1"] == pytest.approx(5 / 9)  # a b c , d of 6 + 3
    assert found["distinct_2"] == pytest.approx(4 / 7)  # ab ba / c, ,d of 5 + 2
    assert found["distinct_3"] == pytest.approx(3 / 5)  # aba bab / c,d of 4 + 1
    assert found["repetition"] == pytest.approx(1 / 3)  # abab baba abab; the other text has no 4-gram
    assert found["words"] == pytest.approx(4.5)
    assert found["empty"] == 0


@given(st.lists(st.text(alphabet="ab .", max_size=40), max_size=5))
def test_shares_stay_shares(texts: list[str]) -> None:
    found = diversity(texts)
    assert all(0 <= value <= 1 for name, value in found.items() if name != "words")


def test_saying_it_twice_halves_what_is_distinct() -> None:
    text = "one two three four five six"
    once, twice = diversity([text]), diversity([text, text])
    assert (once["distinct_3"], twice["distinct_3"]) == (1.0, 0.5)


def test_the_command_writes_results_of_one_file(tmp_path: Path) -> None:
    line = {"index": 0, "document": "0:0", "prefix": "p", "suffix": "s", "text": "one two one two", "ids": [1]}
    header = {"format": FORMAT, "model": "m", "step": "7", "dataset": "standard"}
    made, output = tmp_path / "g.jsonl", tmp_path / "results" / "diversity.json"
    made.write_text("".join(json.dumps(each) + "\n" for each in (header, line | {"finish_reason": "stop"})))
    main(["diversity", str(made), "--output", str(output)])
    found = read_results(output)
    values = {(one.measure, one.dataset): one.value for one in found.results}
    assert values["diversity", "distinct_1"] == 0.5
    assert values["diversity", "distinct_2"] == pytest.approx(2 / 3)
    assert all(0 <= value <= 1 for value in values.values())
    assert (found.about["model"], found.about["step"], found.about["of"]) == ("m", "7", "standard")
    assert found.about["words"] == 4
    with pytest.raises(SystemExit, match="of one file of generations"):
        main(["diversity", str(made), str(made), "--output", str(output)])
    made.write_text(json.dumps(header) + "\n")
    with pytest.raises(SystemExit, match="no generation"):
        main(["diversity", str(made)])
