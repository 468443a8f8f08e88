"""Every flag of ours, in groups: name, what argparse is told, help. `parse` makes a namespace of them, `settings` the rest.

Teacher, rewriter and the judge of the held-out comparison have the same flags, --ROLE-url, --ROLE-api, ...; a role without
servers of its own is the teacher's work.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from megatron_sip.config.held_out import EVAL_RECORDS
from megatron_sip.data.roles import ROLES as DOCUMENT_ROLES
from megatron_sip.judge.settings import SCHEDULE_NAMES
from megatron_sip.records import CANDIDATE_KINDS

TASK_KINDS = ("documents", "judgements", "rewrites", "thoughts")

GROUP_TITLE = "self-improving pretraining"
Role = Literal["teacher", "rewriter", "eval_judge"]
ROLES: dict[Role, str] = {
    "teacher": "the judge and rewriter",
    "rewriter": "the rewriter, where it is not the teacher",
    "eval_judge": "the judge of the held-out comparison, where it is not the teacher",
}
"""By the name among the arguments -> what the servers are."""

Flags = dict[str, tuple[dict[str, Any], str]]
"""Flag -> (settings for argparse, help)."""

RUN_FLAGS: Flags = {
    "--preset": ({"metavar": "NAME|FILE"}, "Flags of a file, see docs/presets.md; flags after it win over its own."),
    "--verbose": ({"action": "store_true"}, "Show on the screen what Megatron and others print, not in RUN_DIR/logs/."),
    "--dry-run": ({"action": "store_true"}, "Say what the flags mean and cost in calls and tokens, and exit."),
    "--run-dir": (
        {"metavar": "DIR"},
        "Folder for metrics.jsonl, samples, server logs, plots and summary.json. Default: the folder of --save.",
    ),
    "--started-as": ({"metavar": "COMMAND"}, "What the report names as the command that continues the run."),
    "--load-last-whole": (
        {"action": "store_true"},
        "When files of the latest checkpoint are damaged, move it aside and continue from the newest one that is whole.",
    ),
    "--step-timeout": (
        {"type": float, "default": 21600.0, "metavar": "SECONDS"},
        "A process whose step, validation or checkpoint takes longer says what it was doing and ends, so that its job restarts "
        "at the last checkpoint; 0: never. More than the slowest step may take: waiting for rollouts alone may take 24 times "
        "--rollout-timeout, then a group's judgements 8 times --judge-deadline once they are asked for.",
    ),
    "--save-groups": ({"metavar": "DIR"}, "Write every step's judged groups there, compressed."),
    "--replay-groups": ({"metavar": "DIR"}, "Train from groups written by --save-groups, without engines and teacher."),
    "--eval-records": (
        {"type": int, "default": EVAL_RECORDS, "metavar": "N"},
        "Held-out records or prefixes that are measured every --eval-interval steps.",
    ),
    "--eval-suites": (
        {"nargs": "+", "metavar": "SUITE"},
        "Of documents, what --eval-interval measures on held-out prefixes: nll (of their suffixes), diversity (of "
        "continuations), win-rate (over the initial policy), and sets of prompts, NAME=FILE, whose continuations are rated for "
        "safety (`megatron-sip-evaluate sets`); the last two by --eval-judge-url. Default: nll diversity.",
    ),
    "--eval-by-training-judge": (
        {"action": "store_true"},
        "Let win-rate and sets of --eval-suites be judged by the judge that the policy is trained to please.",
    ),
    "--win-rate-prompts": (
        {"type": int, "default": 0, "metavar": "N"},
        "At the end compare the trained policy with the initial one on N held-out prefixes; 0 skips it.",
    ),
    "--win-rate-temperature": ({"type": float, "default": 0.0}, "Sampling of the compared continuations; 0 is greedy."),
}
TASK_FLAGS: Flags = {
    "--hf-config": (
        {"metavar": "DIR"},
        "HF folder with config.json and tokenizer of the policy: gives the architecture flags and the tokenizer, and "
        "is what the engines serve. Default: --pretrained-checkpoint, or the folder hf/ inside, which the converter writes.",
    ),
    "--tasks": (
        {"choices": TASK_KINDS, "default": "documents"},
        "What --data-path holds. documents: text, cut into prefix and suffix. judgements, rewrites, thoughts: labelled records "
        "in JSON lines, which train a judge, a rewriter, a thinker (docs/labelled_tasks.md).",
    ),
    "--subset": (
        {"choices": DOCUMENT_ROLES},
        "Of corpora that `megatron-sip-prepare roles` made, whose folders --data-path then names: the documents of this role; "
        "train, valid and test are the corpus's own.",
    ),
    "--max-prompt-length": (
        {"type": int, "metavar": "TOKENS"},
        "Of a labelled task's prompt; a longer one's prefix is cut at its left. Default: --seq-length minus --suffix-length.",
    ),
    "--suffix-length": (
        {"type": int, "default": 128, "metavar": "N"},
        "Tokens of a suffix, a rewrite and a rollout; the longest answer to a labelled task.",
    ),
    "--task-mode": (
        {"choices": ["random", "stream", "whole"], "default": "random"},
        "random: one seeded cut a document and epoch. stream: every chunk of --suffix-length tokens in turn. whole: documents "
        "in pieces of up to --seq-length tokens, for --sft-target document.",
    ),
    "--min-prefix-length": (
        {"type": int, "default": 16, "metavar": "N"},
        "Shortest prefix that a document is cut into.",
    ),
    "--text-field": ({"default": "text"}, "Field of jsonl and parquet records that holds the text."),
    "--prepend-bos": (
        {"choices": ["auto", "on", "off"], "default": "auto"},
        "Begin documents with the tokenizer's BOS. auto: if the tokenizer puts one before plain text, as for Llama 3.",
    ),
    "--row-length": (
        {"type": int, "metavar": "TOKENS"},
        "Longest packed row (micro-batch). Several groups share a row. Default: just enough for one full group, "
        "--seq-length, and --suffix-length more for each branch after the first (two for dpo, --num-rollouts for grpo); on "
        "GPUs so many groups as their memory has room for.",
    ),
    "--branches-per-row": (
        {"type": int, "metavar": "N"},
        "Spread a group of --objective grpo over rows of N rollouts, each with its own copy of the prefix; the gradient "
        "stays. Default: a whole group in a row.",
    ),
}
OBJECTIVE_FLAGS: Flags = {
    "--objective": (
        {"choices": ["sft", "rf-nll", "dpo", "grpo"], "default": "dpo"},
        "sft: NLL of --sft-target. rf-nll: NLL of the best-judged candidate. dpo: online DPO, best against worst. grpo: "
        "policy gradient on all rollouts, by their scores against their group's mean.",
    ),
    "--candidates": (
        {"nargs": "+", "choices": CANDIDATE_KINDS, "metavar": "KIND"},
        "Kinds of candidates that are judged: suffix, rewrite, rollout. Default: suffix rollout, of labelled tasks rollout.",
    ),
    "--sft-target": (
        {"choices": (*CANDIDATE_KINDS, "document"), "default": "suffix"},
        "What --objective sft learns; asks no judge. document: every token of prefix and suffix, as plain pretraining does.",
    ),
    "--suffix-end-step": (
        {"type": int, "metavar": "STEP"},
        "From this step on the suffix is no candidate any more. Default: it stays one.",
    ),
    "--rewrite-end-step": (
        {"type": int, "metavar": "STEP"},
        "The same for rewrites, which are then no longer asked for.",
    ),
    "--control-token": (
        {"metavar": "CRITERION"},
        "With --objective rf-nll learn the best candidate that this one of --criteria finds good behind one text before the "
        "prefix, and beside it the worst that it finds bad behind another; see docs/training.md.",
    ),
    "--control-text": (
        {"nargs": 2, "metavar": ("GOOD", "BAD")},
        "The two texts; special tokens of the policy's tokenizer are recognised. Default: [CRITERION: good] and [CRITERION: "
        "bad], each on a line of its own.",
    ),
    "--control-threshold": (
        {"type": float, "default": 0.5, "metavar": "SCORE"},
        "From this score on a candidate is good.",
    ),
    "--dpo-pair": (
        {"nargs": 2, "choices": CANDIDATE_KINDS, "metavar": ("CHOSEN", "REJECTED")},
        "Fix the roles of the DPO pair by kind and ask no judge, e.g. --dpo-pair rewrite rollout.",
    ),
    "--dpo-beta": ({"type": float, "default": 0.1}, "DPO's temperature on the log-ratio margin."),
    "--dpo-nll-coef": ({"type": float, "default": 0.0}, "Weight of an NLL term on the chosen branch."),
    "--dpo-label-smoothing": ({"type": float, "default": 0.0}, "Assumed rate of flipped preferences."),
    "--dpo-loss": ({"choices": ["sigmoid", "ipo"], "default": "sigmoid"}, "Shape of the pair loss."),
    "--grpo-length": (
        {"choices": ["token", "sequence", "constant"], "default": "token"},
        "What GRPO's loss is a mean over. token: all tokens of the step (DAPO). sequence: each rollout's tokens, then rollouts "
        "(the first GRPO). constant: rollouts, each one's sum divided by --suffix-length (Dr. GRPO).",
    ),
    "--grpo-clip-low": (
        {"type": float, "default": 0.2},
        "GRPO's probability ratio counts down to 1 minus this; of no effect "
        "while a step makes a single update, as it does.",
    ),
    "--grpo-clip-high": ({"type": float, "default": 0.28}, "And up to 1 plus this; of no effect likewise."),
    "--grpo-kl-coef": (
        {"type": float, "default": 0.0},
        "Weight of GRPO's KL penalty towards the reference; 0: none, and no reference model.",
    ),
    "--grpo-spread-normalization": (
        {"action": "store_true"},
        "Divide advantages by the standard deviation of their group's scores.",
    ),
    "--grpo-oversample": (
        {"type": int, "default": 1, "metavar": "N"},
        "Ask up to N rounds of --global-batch-size tasks a step, until so many groups have a spread to learn from.",
    ),
    "--min-usable-share": (
        {"type": float, "default": 0.5, "metavar": "SHARE"},
        "Of a step's groups: where fewer came back whole and judged, the step makes no update and says why, so that an "
        "overloaded judge or dying engines do not train on what happens to be left.",
    ),
    "--truncated-answers": (
        {"choices": ["score", "mask", "zero"], "default": "score"},
        "GRPO's rollouts that were cut at --suffix-length. score: as judged. mask: left out, of the mean too. zero: score 0.",
    ),
    "--mismatch-correction": (
        {"choices": ["none", "truncate", "mask"], "default": "truncate"},
        "GRPO's weight of a token by how likely trainer and engine thought it, trainer over engine. truncate: at most 2. "
        "mask: tokens outside 0.5 to 5 are left out (IcePop).",
    ),
    "--ref-update-interval": (
        {"type": int, "default": 0, "metavar": "STEPS"},
        "Copy the policy into the reference every so many steps; 0 keeps the initial policy for ever.",
    ),
    "--logit-chunk-columns": (
        {"type": int, "default": 0, "metavar": "N"},
        "Hold the logits of N vocabulary entries at a time (8192 is good) and compute them again in backward: slower, "
        "for when the logits of a row's branches do not fit. 0: all at once.",
    ),
    "--ref-offload": (
        {"action": "store_true"},
        "Keep the reference's weights in pinned host memory and swap them in for its pass: saves one copy of the "
        "weights on the GPU.",
    ),
}
ROLLOUT_FLAGS: Flags = {
    "--num-rollouts": ({"type": int, "default": 16, "metavar": "K"}, "Rollouts of the policy per prefix."),
    "--rollout-temperature": ({"type": float, "default": 1.0}, "0 is greedy."),
    "--rollout-top-p": ({"type": float, "default": 1.0}, "Nucleus of the rollouts' sampling."),
    "--rollout-start-step": (
        {"type": int, "default": 0, "metavar": "STEP"},
        "Before this step only suffix and rewrite are candidates (early rollouts of a fresh policy are noise).",
    ),
    "--rollout-url": ({"nargs": "+", "metavar": "URL"}, "Running SGLang engines that serve the policy."),
    "--rollout-key-variable": (
        {"metavar": "NAME"},
        "Environment variable that holds the key which the engines demand (SGLang's --api-key).",
    ),
    "--rollout-local": ({"type": int, "default": 0, "metavar": "N"}, "Start N SGLang engines on this node instead."),
    "--rollout-timeout": ({"type": float, "default": 600.0, "metavar": "SECONDS"}, "For one engine call."),
    "--rollout-concurrency": (
        {"type": int, "metavar": "CALLS"},
        "Calls in flight of all data-parallel replicas together. Default: 64 for each engine, 256 at least.",
    ),
    "--local-engine-dtype": (
        {"choices": ["bfloat16", "float16", "float32"], "default": "bfloat16"},
        "Number format of the engines that --rollout-local starts; without a GPU and AVX-512 BF16 bfloat16 stands for "
        "float32. A teacher or rewriter that is started there keeps a float32 that its config.json names.",
    ),
    "--local-engine-tokens": (
        {"type": int, "metavar": "TOKENS"},
        "Size of a local server's KV cache. Default: SGLang's choice with a GPU, 32768 without.",
    ),
    "--local-server-memory": (
        {"type": float, "metavar": "SHARE"},
        "What each local server takes of a GPU's memory; servers then share the GPUs behind the trainer's, or its last "
        "one. Default: a GPU a server, with --colocate 0.4.",
    ),
    "--colocate": (
        {"action": "store_true"},
        "Engines of --rollout-local are on the trainer's GPUs, and free their memory while it trains (weights then go by gloo, "
        "or by a disk). The trainer keeps weights, gradients and optimizer; without a GPU nothing is freed.",
    ),
    "--weight-sync": (
        {"choices": ["distributed", "disk"], "default": "distributed"},
        "distributed: broadcast buckets to the engines (NCCL, or gloo without GPUs). disk: through --weight-sync-dir.",
    ),
    "--weight-sync-dir": ({"metavar": "DIR"}, "Folder that trainer and engines share. Default: RUN_DIR/weights."),
    "--weight-sync-bucket-mb": ({"type": int, "default": 512, "metavar": "MB"}, "Size of one broadcast."),
    "--max-staleness": (
        {"type": int, "choices": [0, 1], "default": 0},
        "Updates that rollouts may be behind. 0, strictly on-policy: a step's experience is made when it begins. 1: "
        "while the step before it trains, so that trainer and servers work at the same time.",
    ),
}
SERVER_FLAGS: Flags = {
    "url": ({"nargs": "+", "metavar": "URL"}, "Running servers of the judge and rewriter."),
    "api": (
        {"choices": ["sglang", "openai"], "default": "sglang"},
        "sglang: native API (likelihood and soft verdicts). openai: any OpenAI-compatible server.",
    ),
    "name": (
        {"metavar": "MODEL"},
        "Model name sent to an OpenAI-type server, and the name that --judge-cache keeps answers under. Default for SGLang: "
        "the name that the server reports.",
    ),
    "key-variable": ({"metavar": "NAME"}, "Environment variable that holds the API key."),
    "tokenizer": (
        {"metavar": "DIR"},
        "Tokenizer of an SGLang teacher. Default: --teacher-model, or the path that the server reports.",
    ),
    "prefill": (
        {"action": "store_true"},
        "An OpenAI-type server continues an answer that we begin (vLLM, SGLang): soft verdicts then cost one token.",
    ),
    "answer-prefix": (
        {"metavar": "TEXT", "default": ""},
        "Put between an SGLang teacher's chat template and an answer that we begin, special tokens included. Default: what "
        "its template needs to end reasoning, as </think> or gpt-oss's <|channel|>final<|message|>.",
    ),
    "reasoning-tokens": (
        {"type": int, "metavar": "TOKENS", "default": 0},
        "For reasoning (gpt-oss, <think>), on top of each written answer's own tokens. Needed for written verdicts of a "
        "model that always reasons, for example 2048.",
    ),
    "context": (
        {"type": int, "metavar": "TOKENS"},
        "What a request and its answer may take together; of longer prefixes only the end is shown, and counted. Default: "
        "what the server reports.",
    ),
    "requests-per-second": ({"type": float, "metavar": "N", "default": 0.0}, "Limit for each URL; 0: none."),
}
"""Name, the same for each role, instead of the flag."""
REWRITE_FLAGS: Flags = {
    "--rewrite-temperature": ({"type": float, "default": 0.0}, "Sampling of the rewriter; 0 is greedy."),
    "--rewrite-prompt": (
        {"metavar": "FILE"},
        "The rewriter's instructions, a prompt file of kind text, for other rewrites than safe and true ones; see "
        "docs/judging.md. Default: as `python -m megatron_sip.judge show rewrite` prints them.",
    ),
}
TEACHER_FLAGS: Flags = {
    "--teacher-timeout": (
        {"type": float, "default": 120.0, "metavar": "SECONDS"},
        "For one attempt of one teacher call.",
    ),
    "--judge-prefix-chars": (
        {"type": int, "default": 16_000, "metavar": "CHARS"},
        "Of a longer prefix, judge and rewriter are shown the end only.",
    ),
}
JUDGE_FLAGS: Flags = {
    "--criteria": (
        {"nargs": "+", "metavar": "NAME=WEIGHT"},
        "What is scored, summed with weights: quality, safety, factuality, likelihood, the path of a prompt file of your own "
        "(*.txt), or a Python function (package.module:function). Default: likelihood=1; of judgements label=1, of rewrites "
        "copy=1 rewrite=1, of thoughts similarity=1.",
    ),
    "--criteria-timeout": (
        {"type": float, "default": 60.0, "metavar": "SECONDS"},
        "For one call of a criterion that is a Python function, about the candidates of one prompt.",
    ),
    "--criteria-processes": (
        {"type": int, "default": 1, "metavar": "N"},
        "Processes of each data-parallel replica that call such a function.",
    ),
    "--judge-verdict": (
        {"nargs": "+", "default": ["soft"], "metavar": "MODE"},
        "hard: the judge writes, and --judge-votes verdicts are read. soft: the probability of its verdict token. "
        "One word for all criteria, NAME=MODE for one: soft safety=hard. With --tasks judgements this is the way of the judge "
        "in training: hard verdicts are written, soft ones begun up to their first token.",
    ),
    "--judge-votes": ({"type": int, "default": 5}, "Verdicts asked per judgement (paper: 5)."),
    "--judge-temperature": ({"type": float, "default": 1.0}, "Sampling of verdicts (paper: 1.0)."),
    "--judge-top-p": (
        {"type": float, "default": 0.6},
        "Nucleus of the verdicts' sampling (paper: 0.6). An option with that much probability gets all hard votes.",
    ),
    "--judge-max-tokens": (
        {"type": int, "default": 512, "metavar": "TOKENS"},
        "Of one written verdict, the reasons in it included. See --teacher-reasoning-tokens.",
    ),
    "--judge-quorum": (
        {"type": float, "default": 0.5, "metavar": "SHARE"},
        "A candidate with less than this share of its verdicts, the missing ones asked for once more, is dropped, and "
        "counted; its group stays while two are left.",
    ),
    "--judge-schedule": (
        {"choices": SCHEDULE_NAMES, "default": "circulant_bt"},
        "Which pairs a pairwise criterion compares. all_pairs is the paper's; see docs/judging.md for what each costs.",
    ),
    "--judge-degree": ({"type": int, "default": 6}, "Opponents of each candidate under circulant_bt."),
    "--judge-budget": ({"type": int, "default": 48}, "Comparisons a group under two_ended_bt."),
    "--judge-pivot": (
        {"choices": ["suffix", "rollout"], "default": "suffix"},
        "Whom all candidates meet under pivot: for comparison only, never chosen or rejected.",
    ),
    "--judge-pivot-competes": (
        {"action": "store_true"},
        "The pivot is itself a candidate, of the kinds in --candidates, with a constant win rate of 0.5.",
    ),
    "--judge-both-orders": (
        {"action": "store_true"},
        "Show every pair in both orders, for a judge that prefers whichever option comes first.",
    ),
    "--judge-likelihood-prior": (
        {"action": "store_true"},
        "Start circulant_bt and two_ended_bt from the likelihood, one prefill a candidate; needs --teacher-api sglang.",
    ),
    "--judge-audit-rate": (
        {"type": float, "default": 0.01, "metavar": "SHARE"},
        "Of the groups; on these all pairs are asked too, and the agreement is logged.",
    ),
    "--judge-deadline": (
        {"type": float, "default": 900.0, "metavar": "SECONDS"},
        "For a group's judgements, from when its candidates are there or, if later, from the last answer to any group: a "
        "teacher that is slow is waited for (8 times as long at most, once it is asked), one that is gone is not. The same for "
        "rewrites.",
    ),
    "--judge-concurrency": (
        {"type": int, "metavar": "CALLS"},
        "Teacher calls in flight of all data-parallel replicas together. Default: 64 for each server, 256 at least.",
    ),
    "--judge-cache": ({"metavar": "DIR"}, "Keep verdicts on disk; a resumed step then asks no one."),
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, in groups of their own."""

    def section(name: str) -> argparse._ArgumentGroup:
        return parser.add_argument_group(title=f"{GROUP_TITLE}: {name}")

    add_flags(section("the run"), RUN_FLAGS)
    add_flags(section("policy and tasks"), TASK_FLAGS)
    add_flags(section("objective"), OBJECTIVE_FLAGS)
    add_flags(section("rollouts and local servers"), ROLLOUT_FLAGS)
    group = section("teacher")
    group.add_argument("--teacher-model", metavar="DIR", help="Start an SGLang server of this HF model on this node.")
    group.add_argument(
        "--teacher-replicas",
        type=int,
        default=1,
        metavar="N",
        help="Start N of --teacher-model, which share the calls.",
    )
    add_teacher_flags(group)
    add_flags(group, REWRITE_FLAGS)
    group = section("another server for the rewriter, or for the held-out judge")
    group.add_argument(
        "--rewriter-model", metavar="DIR", help="Start an SGLang server of this HF model on this node for the rewriter."
    )
    add_server_flags(group, "rewriter")
    add_server_flags(group, "eval_judge")
    add_flags(section("judge"), JUDGE_FLAGS)
    return parser


def add_teacher_flags(group: argparse._ActionsContainer) -> None:
    """The servers of judge and rewriter, and how they are reached."""
    add_server_flags(group, "teacher")
    add_flags(group, TEACHER_FLAGS)


def add_flags(group: argparse._ActionsContainer, flags: Flags) -> None:
    for name, (settings, text) in flags.items():
        group.add_argument(name, **settings, help=text)


def add_server_flags(group: argparse._ActionsContainer, role: Role) -> None:
    """How the servers of `role` are reached and asked."""
    prefix = f"--{role.replace('_', '-')}"
    for name, (settings, text) in SERVER_FLAGS.items():
        short = f"Servers of {ROLES[role]}." if name == "url" else f"As --teacher-{name}."
        group.add_argument(f"{prefix}-{name}", **settings, help=text if role == "teacher" else short)
