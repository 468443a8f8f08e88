"""The log-prob op over two tensor-parallel ranks equals the op on whole rows.

The test starts this file under torchrun; each rank compares its shard with the unsharded result.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sip.kernels.linear_logprob import linear_token_logprobs
from megatron_sip.kernels.logprob import token_logprobs

ROWS, VOCAB, HIDDEN = 7, 64, 12
LOGIT_ROWS = torch.tensor([0, 1, 2, 0, 5, 6, 0, 0])
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def test_two_ranks_equal_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert [done.stdout.count(f"checked-rank-{rank}") for rank in (0, 1)] == [1, 1]


def targets_below(vocab_size: int) -> torch.Tensor:
    return torch.tensor([0, 31, 32, 63, 5, 40, 63, 63]) % vocab_size


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]


def loss(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens.double() * torch.linspace(-1, 2, tokens.numel(), dtype=torch.float64)).sum()


def check_logits(rank: int, dtype: torch.dtype, vocab_size: int, inplace: bool) -> None:
    """`vocab_size` 61 leaves padding on the second rank, 32 leaves it nothing else."""
    logits = (5 * torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[5, :30] = -torch.inf
    targets = targets_below(vocab_size)
    whole = logits.clone().requires_grad_()
    expected = token_logprobs(whole * 1, LOGIT_ROWS, targets, vocab_size=vocab_size, inplace=inplace)
    loss(expected).backward()
    columns = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    shard = logits[:, columns].clone().requires_grad_()
    result = token_logprobs(
        shard * 1,
        LOGIT_ROWS,
        targets,
        tp_group=dist.group.WORLD,
        vocab_start=columns.start,
        vocab_size=vocab_size,
        inplace=inplace,
    )
    loss(result).backward()
    exact = tolerance(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result, expected, rtol=exact, atol=exact)
    assert shard.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(shard.grad, whole.grad[:, columns], rtol=tolerance(dtype), atol=1e-6)


def check_linear(rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    targets = targets_below(61)
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = token_logprobs(whole_hidden @ whole_weight.T, LOGIT_ROWS, targets, vocab_size=61)
    loss(expected).backward()
    columns = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    own_hidden, own_weight = hidden.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    result = linear_token_logprobs(
        own_hidden,
        own_weight,
        LOGIT_ROWS,
        targets,
        tp_group=dist.group.WORLD,
        vocab_start=columns.start,
        vocab_size=61,
        chunk_columns=10,
    )
    loss(result).backward()
    allowed = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]
    pairs = [(result, expected), (own_hidden.grad, whole_hidden.grad)]
    assert whole_weight.grad is not None
    pairs.append((own_weight.grad, whole_weight.grad[columns]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for dtype in DTYPES:
        for vocab_size in (64, 61, 32):
            for inplace in (True, False):
                check_logits(rank, dtype, vocab_size, inplace)
        check_linear(rank, dtype)
    dist.destroy_process_group()
    print(f"checked-rank-{rank}", flush=True)


if __name__ == "__main__":
    main()
