"""Token ids that documents can hold against the vocabulary of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import byte_level_tokenizer
from tokenizers import AddedToken

from megatron_sip.data.documents import open_corpus
from megatron_sip.data.token_store import TokenStoreWriter
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.errors import DataError

MODEL_VOCABULARY = len(byte_level_tokenizer())


@pytest.fixture
def settings(tmp_path: Path) -> TokenizeSettings:
    return TokenizeSettings(cache_dir=tmp_path / "cache")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "padded with [PAD] and <extra>"}) + "\n")
    return str(path)


def test_a_padding_token_beyond_the_model_s_vocabulary_never_reaches_the_data(
    settings: TokenizeSettings, text: str
) -> None:
    """Llama 2 with an added [PAD] = 32000: spelt out in a document it is plain text."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == MODEL_VOCABULARY
    corpus = open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY)
    assert corpus.vocab_size == MODEL_VOCABULARY
    assert int(corpus.sources[0].tokens(0).max()) < MODEL_VOCABULARY


def test_an_added_token_that_documents_can_hold_is_refused_before_tokenising(
    settings: TokenizeSettings, text: str
) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    with pytest.raises(DataError, match=rf"ids up to {MODEL_VOCABULARY}, .* has only {MODEL_VOCABULARY}:"):
        open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY)
    assert not settings.cache_dir.exists()
    open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY + 1)


def test_an_eos_beyond_the_model_s_vocabulary_is_refused_where_it_is_used(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    for append_eos in (True, False):
        settings = TokenizeSettings(cache_dir=tmp_path / "cache", append_eos=append_eos)
        if append_eos:
            with pytest.raises(DataError, match=f"ids up to {MODEL_VOCABULARY}"):
                open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY)
        else:
            open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY)


def test_an_unknown_token_that_the_tokenizer_never_gives_does_not_count(settings: TokenizeSettings, text: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert tokenizer.unk_token_id == MODEL_VOCABULARY
    open_corpus([text], tokenizer, settings, vocab_size=MODEL_VOCABULARY)


def test_ready_made_tokens_are_held_against_the_model_too(tmp_path: Path, settings: TokenizeSettings) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with TokenStoreWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(np.asarray([1, MODEL_VOCABULARY], np.uint16), np.asarray([2], np.int32))
    with pytest.raises(DataError, match=f"token id {MODEL_VOCABULARY}, but the vocabulary has only {MODEL_VOCABULARY}"):
        open_corpus([str(tmp_path / "s")], tokenizer, settings, vocab_size=MODEL_VOCABULARY)
