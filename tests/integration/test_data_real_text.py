"""The demo's corpus and multilingual text through the real SmolLM2 tokenizer."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_sip.data.documents import Corpus, open_corpus
from megatron_sip.data.tasks import TaskMode, TaskSettings, TaskSource
from megatron_sip.data.tokenization import TokenizeSettings

TOOLS = Path(__file__).parents[2] / "tools"
MULTILINGUAL = (
    "色は匂へど散りぬるを。 Съешь же ещё этих булок. نص عربي قصير 🙂🚀 Größe ½ ∑\n\tdef f(x):\n    return x  # done\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tool = runpy.run_path(str(TOOLS / "fetch_smollm2.py"))
    return AutoTokenizer.from_pretrained(tool["fetch"](tool["DEFAULT_SAVE"]))


@pytest.fixture(scope="module")
def texts_and_corpus(tmp_path_factory, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], Corpus]:
    folder = tmp_path_factory.mktemp("data")
    topics = runpy.run_path(str(TOOLS / "write_demo_corpus.py"))["write_corpus"](folder / "topics.jsonl")
    with topics.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": MULTILINGUAL * 40}) + "\n")
    texts = [json.loads(line)["text"] for line in topics.read_text(encoding="utf-8").splitlines()]
    settings = TokenizeSettings(cache_dir=folder / "cache")
    return texts, open_corpus([str(topics)], tokenizer, settings)


def test_documents_survive_tokenisation(texts_and_corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    texts, corpus = texts_and_corpus
    (source,) = corpus.sources
    assert len(source) == len(texts) > 45
    for number, text in enumerate(texts):
        ids = source.tokens(number).tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("mode", ["random", "stream"])
def test_shown_texts_are_pieces_of_the_documents(
    texts_and_corpus, tokenizer: PreTrainedTokenizerBase, mode: TaskMode
) -> None:
    texts, corpus = texts_and_corpus
    splits = corpus.split("8,2")
    drawn = {name: TaskSource(splits[name], tokenizer, TaskSettings(192, 64, mode)) for name in ("train", "valid")}
    held_out = {texts[i] for i in splits["valid"].documents(0)}
    for name, source in drawn.items():
        documents = [text for text in texts if (text in held_out) == (name == "valid")]
        for task in source.tasks(0, source.tasks_per_epoch[0]):
            assert len(task.suffix_ids) == 64
            assert any(task.prefix_text + task.suffix_text in text for text in documents)
