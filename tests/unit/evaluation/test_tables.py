"""Tables of the paper with rows of one's own: its weights reproduce its averages; what is missing stays empty."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluate import main
from megatron_sip.evaluation.commands.nll import DOCUMENT, SUFFIX
from megatron_sip.evaluation.diversity import SHARES
from megatron_sip.evaluation.results import Result, write_results
from megatron_sip.evaluation.tables import WEIGHTS, average, cell, html, make_tables, markdown, read_run

PAPER = json.loads((files("megatron_sip.evaluation") / "published.json").read_text())
FACTUALITY = [  # tables 16 and 19, and the averages of tables 14 and 18
    ([36.6, 50.0, 50.0, 50.1, 50.0, 22.4, 35.9], 42.3),
    ([35.4, 48.9, 50.8, 51.4, 61.5, 21.5, 35.5], 44.0),
    ([37.8, 53.9, 52.3, 53.6, 64.2, 22.9, 36.3], 46.2),
    ([43.6, 54.3, 53.6, 53.2, 72.0, 23.9, 37.3], 48.8),
    ([60.0, 68.4, 57.2, 59.0, 87.6, 24.7, 38.0], 56.9),
    ([63.5, 69.3, 54.6, 58.5, 84.7, 27.7, 42.5], 57.6),
    ([61.1, 67.9, 56.1, 59.9, 77.9, 25.3, 38.9], 55.7),
]


def published(number: str, columns: str) -> list[tuple[str, dict[str, Result]]]:
    """Rows of a published table as results of `columns`."""
    rows = []
    for part in next(table for table in PAPER["tables"] if table["number"] == number)["parts"]:
        for row in part["rows"]:
            values = {
                name: Result(*name.split("/"), value / 100, 1)
                for name, value in zip(part["columns"], row["values"], strict=True)
            }
            rows.append((row["model"], {name: value for name, value in values.items() if name.startswith(columns)}))
    return rows


@pytest.mark.parametrize(("scores", "expected"), FACTUALITY)
def test_the_weights_reproduce_the_published_factuality(scores: list[float], expected: float) -> None:
    names = WEIGHTS["factuality"]
    values = {
        f"factuality/{name}": Result("factuality", name, score / 100, 1)
        for name, score in zip(names, scores, strict=True)
    }
    assert 100 * (average("factuality", values) or 0) == pytest.approx(expected, abs=0.05 + 1e-9)


def test_the_weights_reproduce_the_published_safety() -> None:
    found = {model: 100 * (average("safety", values) or 0) for model, values in published("5", "safety/")}
    assert found["Llama Base"] == pytest.approx(76.9, abs=0.1)
    assert found["Self-Improving Pretraining"] == pytest.approx(91.1, abs=0.1)
    assert found["next token, RedPajama"] == pytest.approx(76.8, abs=0.1)  # the paper's text says 75.5 of this row


def test_the_plain_mean_reproduces_the_published_standard_tasks() -> None:
    found = {model: 100 * (average("standard", values) or 0) for model, values in published("3", "standard/")}
    expected = {
        "Llama Base": 47.6,
        "next token, SlimPajama": 46.8,
        "Self-Improving Pretraining, quality": 50.8,
        "Self-Improving Pretraining, factuality": 50.5,
        "next token, RedPajama": 47.9,
        "Self-Improving Pretraining, safety": 49.1,
    }
    assert found == {name: pytest.approx(value, abs=0.051) for name, value in expected.items()}


def test_the_weights_are_not_those_of_equal_datasets() -> None:
    """Sample weights matter: the plain mean of table 5's first row is another number."""
    [(_, values), *_] = published("5", "safety/")
    assert sum(result.value for result in values.values()) / 5 < (average("safety", values) or 0) - 0.04


def test_a_run_stands_beneath_the_published_rows_and_what_is_missing_stays_empty(tmp_path: Path) -> None:
    write_results(tmp_path / "ours" / "quality.json", {}, [Result("quality", "standard", 0.8, 1000, (0.77, 0.83))])
    write_results(tmp_path / "ours" / "nll.json", {}, [Result("nll", "suffix", 3.0, 10)])
    (tmp_path / "ours" / "other.json").write_text("{}")
    [quality, *_] = make_tables({"ours": read_run(tmp_path / "ours")}, ["1"])
    assert [row.published for row in quality.rows] == [True, True, True, False]
    assert [cell(quality.rows[-1], place) for place in range(3)] == ["80.0 [77.0, 83.0]", "", ""]
    assert [cell(quality.rows[2], place) for place in range(3)] == ["86.3", "50.8", "87.9"]
    assert "| **ours** | 80.0 [77.0, 83.0] |  |  |" in markdown([quality])


def test_an_average_needs_all_its_datasets() -> None:
    values = {f"safety/{name}": Result("safety", name, 1.0, 1) for name in WEIGHTS["safety"]}
    assert average("safety", values) == 1.0
    del values["safety/toxigen"]
    assert average("safety", values) is None


def test_every_column_has_a_heading_and_every_row_a_value_for_each() -> None:
    for table in make_tables({}):
        assert all(len(row.values) == len(table.columns) for row in table.rows)
        assert all(text in markdown([table]) for text in ("model", table.title))


def test_html_shows_a_name_as_it_is(tmp_path: Path) -> None:
    write_results(tmp_path / "r" / "a.json", {}, [Result("quality", "standard", 0.5, 1)])
    page = html(make_tables({"<b>": read_run(tmp_path / "r")}, ["1"]))
    assert "<strong>&lt;b&gt;</strong>" in page
    assert "<td>50.0</td>" in page


def test_the_command_writes_the_tables_that_a_run_adds_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "r" / "a.json", {}, [Result("coherence", "standard", 0.5, 1)])
    main(["table", str(tmp_path / "r")])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("###")] == [
        "### Table 1: Main results. Pretraining for quality",
        "### Table 14: Number of rollouts. Pretraining for quality",
    ]
    main(["table", f"mine={tmp_path / 'r'}", "--tables", "1", "--output", str(tmp_path / "t.html")])
    assert "<strong>mine</strong>" in (tmp_path / "t.html").read_text()


def test_what_those_tables_do_not_show_has_tables_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the last stages of examples/cycle.sh make of a model, and nothing else."""
    for name, nats in (("base", 2.98121), ("trained", 2.5)):
        about = {"model": name}
        write_results(
            tmp_path / name / "diversity.json", about, [Result("diversity", what, 0.25, 64) for what in SHARES]
        )
        likelihoods = [Result("nll", of, nats, 64, (nats - 0.5, nats + 0.5)) for of in (SUFFIX, DOCUMENT)]
        write_results(tmp_path / name / "nll.json", about, likelihoods)
    main(["table", str(tmp_path / "base"), str(tmp_path / "trained")])
    diversity, nll = capsys.readouterr().out.rstrip().split("\n\n### ")
    assert diversity.startswith("### Other numbers: diversity, per cent\n")
    assert "| model | distinct_1 | distinct_2 | distinct_3 | repetition | empty |" in diversity
    assert "| **trained** | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 |" in diversity
    assert nll.startswith("Other numbers: nll, nats a token\n\n| model | suffix | document |")
    assert "| **base** | 2.9812 [2.4812, 3.4812] | 2.9812 [2.4812, 3.4812] |" in nll
    main(["table", str(tmp_path / "base"), str(tmp_path / "trained"), "--output", str(tmp_path / "t.html")])
    assert "<td>2.5000 [2.0000, 3.0000]</td>" in (tmp_path / "t.html").read_text()


def test_rows_of_other_samples_are_told_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run with --limit 300 and one of all questions are not to be compared, though they stand under each other."""
    for name, samples in (("base", 300), ("trained", 3270)):
        found = [Result("standard", "boolq", 0.5, samples), Result("standard", "piqa", 0.5, 300)]
        write_results(tmp_path / name / "tasks.json", {"model": name}, found)
    words = ["table", str(tmp_path / "base"), str(tmp_path / "trained"), "--tables", "3"]
    main(words)
    shown = capsys.readouterr().out
    note = "boolq: not the same samples: base 300, trained 3,270."
    assert shown.rstrip().endswith("|\n\n" + note)
    assert "piqa: not" not in shown
    main([*words, "--output", str(tmp_path / "t.html")])
    assert f"</table>\n<p>{note}</p>" in (tmp_path / "t.html").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    write_results(tmp_path / "r" / "a.json", {}, [Result("nll", "suffix", 3.0, 1)])
    (tmp_path / "empty").mkdir()
    for words, message in [
        ([str(tmp_path / "r"), str(tmp_path / "r")], "called 'r' already"),
        ([str(tmp_path / "empty")], "no file of results"),
        ([str(tmp_path / "nowhere")], "no folder"),
        ([str(tmp_path / "r"), "--tables", "9"], "--tables 9: known are 1, 2"),
        ([str(tmp_path / "r"), "--output", "x.pdf"], r"\.md or \.html"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["table", *words])
    write_results(tmp_path / "r" / "b.json", {}, [Result("nll", "suffix", 3.1, 1)])
    with pytest.raises(DataError, match=r"b\.json and .*a\.json both hold nll/suffix"):
        read_run(tmp_path / "r")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "b", "step": "1"}, "of model b, .*a.json of a"),
        ({"model": "a", "step": "2"}, "of step 2, .*of 1"),
        ({"model": "a"}, "step none"),
    ],
)
def test_a_row_is_one_model_at_one_step(tmp_path: Path, other: dict[str, str], message: str) -> None:
    write_results(tmp_path / "a.json", {"model": "a", "step": "1"}, [Result("nll", "suffix", 3.0, 1)])
    write_results(tmp_path / "b.json", {"model": "a", "step": "1"}, [Result("nll", "document", 3.0, 1)])
    assert len(read_run(tmp_path)) == 2
    write_results(tmp_path / "c.json", other, [Result("safety", "toxigen", 0.5, 1)])
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)
