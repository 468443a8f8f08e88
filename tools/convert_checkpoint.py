"""Convert a model between a Hugging Face folder and a Megatron distributed checkpoint.

    python tools/convert_checkpoint.py hf-to-megatron --load HF_DIR --save CKPT_DIR
    python tools/convert_checkpoint.py megatron-to-hf --load CKPT_DIR --save HF_DIR

One process does; for a model larger than its memory split it with torchrun, for example
`torchrun --nproc-per-node 8 tools/convert_checkpoint.py ... --tensor-model-parallel-size 4
--pipeline-model-parallel-size 2`. The checkpoint does not depend on that: it loads at any parallel size, with
`--pretrained-checkpoint CKPT_DIR`.

CKPT_DIR/hf/ keeps the HF config and tokenizer; megatron-to-hf takes them from there, or from --hf-dir. Llama 2 and 3,
SmolLM2, Qwen2 and Qwen3 convert without loss of a bit; where the config's dtype is narrower than the weights, it says so.

A Megatron checkpoint holds pickles: whoever reads one runs the code in it, this tool and the trainer included. Read only
those that you or people you trust have written. Safetensors hold nothing but numbers.
"""

from megatron_sip.hf.convert import main

if __name__ == "__main__":
    main(description=__doc__)
