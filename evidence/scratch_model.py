"""A model without any training: 7 million random weights of Llama's shape, and a tokenizer of 4,096 pieces made of a text.

python -m evidence.scratch_model --text ~/.cache/megatron_sip/wiki_leads.jsonl --save runs/evidence/from_scratch/random
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_sip.files import move_into_place, read_json_lines

VOCABULARY = 4096
END = "<|endoftext|>"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def tokenizer_of(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """Of SHAPE, in float32."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **SHAPE))


def write(texts: Iterable[str], save: Path, vocabulary: int = VOCABULARY) -> None:
    """Write the HF folder `save`, whole or not at all."""
    save.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save.parent) as work:
        staged = Path(work) / "hf"
        tokenizer = tokenizer_of(texts, vocabulary)
        tokenizer.save_pretrained(staged)
        random_model(tokenizer).save_pretrained(staged)
        move_into_place(staged, save)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help='JSON lines with a "text" each')
    parser.add_argument("--save", type=Path, required=True, help="HF folder to write")
    given = parser.parse_args(words)
    write((record["text"] for record in read_json_lines(given.text, "texts")), given.save)


if __name__ == "__main__":
    main()
