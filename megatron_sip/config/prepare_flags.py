"""The flags of `python -m megatron_sip.prepare`, and what its commands are told by them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sip.config.flags import JUDGE_FLAGS, REWRITE_FLAGS, TASK_FLAGS, Flags, add_flags, add_teacher_flags
from megatron_sip.config.teacher_settings import client_settings
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.data.role_corpus import files_of
from megatron_sip.data.role_corpus import shares_of as corpus_shares
from megatron_sip.data.roles import ROLES, SPLITS, Shares, parse_shares
from megatron_sip.data.source_files import parse_data_path
from megatron_sip.data.tasks import TaskSettings
from megatron_sip.data.text_sources import SUPPORTED, is_text_source
from megatron_sip.judge.corruption import CorruptorSettings
from megatron_sip.judge.rewriter import read_rewrite_prompt
from megatron_sip.judge.settings import JudgeSettings
from megatron_sip.prepare.commands import GroupWork, LabelWork, QualityWork
from megatron_sip.prepare.judgements import TEACHER
from megatron_sip.prepare.rules import RULES
from megatron_sip.prepare.settings import (
    FORMATS,
    CutSettings,
    GroupSettings,
    OutputSettings,
    PrepareError,
    QualitySettings,
    ReadSettings,
    VoteSettings,
)

READ_FLAGS: Flags = {
    "--data-path": (
        {"nargs": "+", "metavar": "FILE"},
        f"Text files or globs, read in this order: {SUPPORTED}. Or the folder of a corpus that `roles` made.",
    ),
    "--text-field": ({"default": "text"}, "Field that holds the text; of records that are cut already, the suffix."),
    "--prefix-field": (
        {"metavar": "NAME"},
        "Records are cut already: this field stands before the text, which is taken whole. Role and split go by it.",
    ),
    "--subset-field": (
        {"metavar": "NAME"},
        "Field after which subsets are called, such as meta.redpajama_set_name. Default: the file's name.",
    ),
    "--role": ({"choices": ROLES}, "Whose documents are read, by a hash of their text, or as a corpus has them."),
    "--role-shares": (
        {"default": "90,5,5", "metavar": "P,J,R"},
        "Of the documents: for the policy, the judge, the rewriter. The same in every command about one corpus.",
    ),
    "--split": (
        {"default": "90,5,5", "metavar": "T,V,T"},
        "Of a role's documents: for training, validation, test, by a hash of their text.",
    ),
    "--max-documents": ({"type": int, "metavar": "N"}, "Stop after N documents of the role. Default: read all."),
    "--seed": ({"type": int, "default": 1234}, "Of cuts, rules, and the balance of labels."),
}
CUT_FLAGS: Flags = {
    "--tokenizer": (
        {"metavar": "DIR"},
        "Tokenizer by whose tokens documents are cut: the policy's. With --prefix-field: those that a model spoils, to their "
        "suffix's length.",
    ),
    "--hf-config": ({"metavar": "DIR"}, "The same, as the trainer names it."),
    "--no-cut": ({"action": "store_true"}, "Take each text whole, with nothing before it."),
    "--seq-length": ({"type": int, "default": 2048, "metavar": "N"}, "Tokens of prefix and suffix together, at most."),
    **{name: TASK_FLAGS[name] for name in ("--suffix-length", "--min-prefix-length")},
    "--task-mode": (
        {"choices": ["random", "stream"], "default": "random"},
        "random: one seeded cut a document. stream: one at every chunk of --suffix-length tokens.",
    ),
}
OUTPUT_FLAGS: Flags = {
    "--out": (
        {"required": True, "metavar": "DIR"},
        "Folder of the records and of manifest.json. The same command goes on with what it holds.",
    ),
    "--format": (
        {"nargs": "+", "choices": FORMATS, "default": ["sip"]},
        "sip: JSON lines for --tasks here. verl: verl/SPLIT.parquet. nemo-gym: nemo-gym/SPLIT.jsonl.",
    ),
}
LABEL_FLAGS: Flags = {
    "--label-field": (
        {"metavar": "NAME"},
        "Field that says whether a text is safe, taken whole (--no-cut, --prefix-field); no judge is asked then.",
    ),
    "--safe-labels": ({"nargs": "+", "default": [], "metavar": "LABEL"}, "Its values that mean safe. Default: true."),
    "--unsafe-labels": ({"nargs": "+", "default": [], "metavar": "LABEL"}, "Those that mean unsafe. Default: false."),
    "--votes": (
        {"type": int, "default": 8, "metavar": "N"},
        "Verdicts of the judge on a text, which must all agree (paper: 8).",
    ),
}
CORRUPTION_FLAGS: Flags = {
    "--corrupt": (
        {"nargs": "+", "choices": [TEACHER, *RULES], "metavar": "RULE"},
        f"How suffixes are spoilt, one way drawn for each: {TEACHER} (a model at --teacher-url), or by rules: "
        f"{', '.join(RULES)}. Default: {TEACHER}.",
    ),
    "--criterion": (
        {"default": "quality", "metavar": "NAME"},
        "Prompt that asks about the two, or the path of a prompt file of your own (*.txt).",
    ),
    "--corrupt-temperature": ({"type": float, "default": 1.0}, "Sampling of the teacher's spoilt versions."),
    "--corrupt-top-p": ({"type": float, "default": 1.0}, "Nucleus of that sampling."),
    "--corrupt-max-tokens": (
        {"type": int, "default": 1024, "metavar": "TOKENS"},
        "Of one answer, its plan and the spoilt version together.",
    ),
}
GROUP_FLAGS: Flags = {
    "--from-groups": (
        {"metavar": "DIR"},
        "Instead of documents: what a run recorded with --save-groups, labelled by the verdicts in it, or by the model at "
        "--teacher-url.",
    ),
    "--agreement": (
        {"type": float, "default": 0.9, "metavar": "SHARE"},
        "Of the verdicts about a pair or a text, which must say the same.",
    ),
    "--min-votes": ({"type": int, "default": 2, "metavar": "N"}, "Least number of verdicts about it."),
    "--one-order": ({"action": "store_true"}, "Also take pairs whose verdicts are of one order of the options only."),
    "--per-group": ({"type": int, "default": 4, "metavar": "N"}, "Pairs or texts of a group, at most."),
}
UNIT_SECONDS = 24 * 3600.0
"""Documents wait that long for servers that are down."""
CALL_SECONDS = 600.0
"""For one attempt of a call whose answer is hundreds of tokens, beside many others."""
VOTES_TOP_P = 1.0
"""The trainer's default, 0.6, would make all votes the same of a judge that is 60% sure, where being unanimous is the test."""
VERDICT_FLAGS = (
    "--judge-temperature",
    "--judge-top-p",
    "--judge-max-tokens",
    "--judge-deadline",
    "--judge-concurrency",
)
"""Of the trainer's flags about judges, those that also matter here."""


def add_judgements_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `judgements`."""
    parser.add_argument(
        "--task", choices=("quality", "safety"), required=True, help="quality: pairs. safety: single suffixes."
    )
    _add_common_flags(parser, role="judge")
    add_flags(parser.add_argument_group("how suffixes are spoilt (--task quality)"), CORRUPTION_FLAGS)
    _add_label_flags(parser, "--task safety")
    add_flags(parser.add_argument_group("from a run's own groups"), GROUP_FLAGS)
    parser.add_argument("--unbalanced", action="store_true", help="Keep all records, not as many YES as NO.")


def add_rewrites_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `rewrites`."""
    _add_common_flags(parser, role="rewriter")
    _add_label_flags(parser, "safe or not")
    prompt, text = REWRITE_FLAGS["--rewrite-prompt"]
    parser.add_argument("--rewrite-prompt", **prompt, help=f"In other trainers' formats: {text}")
    parser.add_argument("--balance", action="store_true", help="Keep as many safe records as unsafe ones.")


def _add_common_flags(parser: argparse.ArgumentParser, role: str) -> None:
    add_flags(parser.add_argument_group("documents"), READ_FLAGS)
    add_flags(parser.add_argument_group("how they are cut"), CUT_FLAGS)
    add_flags(parser.add_argument_group("output"), OUTPUT_FLAGS)
    parser.set_defaults(role=role)


def _add_label_flags(parser: argparse.ArgumentParser, title: str) -> None:
    add_flags(parser.add_argument_group(f"labels ({title})"), LABEL_FLAGS)
    group = parser.add_argument_group("the model that is asked")
    add_teacher_flags(group)
    add_flags(group, {name: JUDGE_FLAGS[name] for name in (*VERDICT_FLAGS, "--judge-cache")})
    parser.set_defaults(judge_deadline=UNIT_SECONDS, teacher_timeout=CALL_SECONDS, judge_top_p=VOTES_TOP_P)


def judgements_work(args: argparse.Namespace) -> QualityWork | LabelWork | GroupWork:
    """What `judgements` does. Raises UserError, naming the flag."""
    check_judgements(args)
    output = output_settings(args, "verdict" if args.task == "safety" and not args.unbalanced else None)
    if args.from_groups is not None:
        votes = vote_settings(args, args.task) if args.teacher_url else None
        return GroupWork(args.task, group_settings(args), output, votes)
    if args.task == "quality":
        return QualityWork(read_settings(args), cut_settings(args), output, quality_settings(args))
    return LabelWork("judgements", read_settings(args), cut_settings(args), output, label_votes(args))


def rewrites_work(args: argparse.Namespace) -> LabelWork:
    """What `rewrites` does. Raises UserError, naming the flag."""
    check_rewrites(args)
    output = output_settings(args, "safe" if args.balance else None)
    if args.rewrite_prompt is not None:
        output = replace(output, rewrite_prompt=read_rewrite_prompt(Path(args.rewrite_prompt)))
    return LabelWork("rewrites", read_settings(args), cut_settings(args), output, label_votes(args))


LENGTHS = ("--seq-length", "--suffix-length", "--min-prefix-length", "--task-mode")
KNOWN_LABELS = ("--safe-labels", "--unsafe-labels")
WRITTEN = ("--judge-temperature", "--judge-top-p", "--judge-max-tokens")
SPOILING = ("--corrupt-temperature", "--corrupt-top-p", "--corrupt-max-tokens")


def check_judgements(args: argparse.Namespace) -> None:
    """Raises DataError naming flags that do nothing beside the others."""

    def refuse(names: Iterable[str], beside: str) -> None:
        refuse_unused(args, add_judgements_flags, names, beside)

    if args.from_groups is not None:
        documents = [name for name in READ_FLAGS if name not in ("--split", "--seed")]
        labels = ("--label-field", *KNOWN_LABELS)
        refuse((*documents, *CUT_FLAGS, *CORRUPTION_FLAGS, *labels), "with --from-groups")
        if not args.teacher_url:
            refuse(("--votes", *WRITTEN), "without --teacher-url, since recorded verdicts are read")
        refuse(("--unbalanced",) if args.task == "quality" else ("--one-order",), f"with --task {args.task}")
        return
    refuse([name for name in GROUP_FLAGS if name != "--from-groups"], "without --from-groups")
    has_teacher = args.task == "quality" and TEACHER in (args.corrupt or [TEACHER])
    if args.task == "quality":
        refuse((*LABEL_FLAGS, "--unbalanced", *WRITTEN), "with --task quality")
        if not has_teacher:
            refuse(("--teacher-url", *SPOILING), f"without --corrupt {TEACHER}")
    else:
        refuse(CORRUPTION_FLAGS, "with --task safety")
        refuse(_unused_of_labels(args), _labelled(args))
    refuse(_unused_of_cuts(args, has_teacher=has_teacher), "with texts that are taken whole")


def check_rewrites(args: argparse.Namespace) -> None:
    """Raises DataError naming flags that do nothing beside the others."""
    refuse_unused(args, add_rewrites_flags, _unused_of_labels(args), _labelled(args))
    refuse_unused(args, add_rewrites_flags, _unused_of_cuts(args, has_teacher=False), "with texts that are taken whole")
    if args.format == ["sip"]:
        names = ["--rewrite-prompt"]
        refuse_unused(
            args, add_rewrites_flags, names, "without --format verl or nemo-gym: the trainer is told of it itself"
        )


def _unused_of_labels(args: argparse.Namespace) -> tuple[str, ...]:
    return KNOWN_LABELS if args.label_field is None else ("--votes", "--teacher-url", *WRITTEN)


def _labelled(args: argparse.Namespace) -> str:
    return "without --label-field" if args.label_field is None else "with --label-field"


def _unused_of_cuts(args: argparse.Namespace, *, has_teacher: bool) -> tuple[str, ...]:
    if not args.no_cut and args.prefix_field is None:
        return ()
    tokenizer = () if has_teacher and not args.no_cut else ("--tokenizer", "--hf-config")
    return *LENGTHS, *tokenizer


def read_settings(args: argparse.Namespace) -> ReadSettings:
    """Which documents are read. Raises DataError, PrepareError."""
    if not args.data_path:
        raise PrepareError("--data-path: name the text files")
    folders = [entry for entry in args.data_path if Path(entry).is_dir()]
    if folders:
        return corpus_settings(args, folders)
    specs = parse_data_path(args.data_path)
    if specs[0].weight is not None:
        raise PrepareError("--data-path: every document is read, so that weights mean nothing: leave them out")
    paths = [path for spec in specs for path in spec.paths]
    if stores := [path for path in paths if not is_text_source(path)]:
        raise PrepareError(f"--data-path {stores[0]}: tokens have no text to hash: name text files ({SUPPORTED})")
    return ReadSettings(
        paths=tuple(paths),
        role=args.role,
        shares=shares_of(args),
        seed=args.seed,
        text_field=args.text_field,
        prefix_field=args.prefix_field,
        subset_field=args.subset_field,
        label_field=getattr(args, "label_field", None),
        safe_labels=tuple(getattr(args, "safe_labels", ())),
        unsafe_labels=tuple(getattr(args, "unsafe_labels", ())),
        max_documents=args.max_documents,
    )


OWN_OF_A_CORPUS = ("--role-shares", "--split", "--text-field", "--subset-field", "--prefix-field", "--label-field")


def corpus_settings(args: argparse.Namespace, folders: Sequence[str]) -> ReadSettings:
    """Of a corpus with roles: the documents of --role, in the splits that it has. Raises DataError, PrepareError."""
    if len(args.data_path) > 1:
        raise PrepareError(f"--data-path {folders[0]}: a corpus is read by itself; name nothing beside it")
    defaults = {name: READ_FLAGS[name][0].get("default") for name in OWN_OF_A_CORPUS if name in READ_FLAGS}
    given = vars(args)
    own = [name for name in OWN_OF_A_CORPUS if given.get(name[2:].replace("-", "_")) != defaults.get(name)]
    if own:
        raise PrepareError(f"{', '.join(own)}: of no effect with a corpus folder, which says it itself: leave it out")
    folder = Path(folders[0])
    return ReadSettings(
        paths=files_of(folder, args.role, "--role", [args.part] if "part" in args else SPLITS),
        role=args.role,
        shares=corpus_shares(folder, "--role"),
        seed=args.seed,
        subset_field="subset",
        max_documents=args.max_documents,
    )


def cut_settings(args: argparse.Namespace) -> CutSettings:
    """How documents are cut. Raises PrepareError without a tokenizer, ValueError for lengths that cannot be."""
    whole = args.no_cut or args.prefix_field is not None
    label = getattr(args, "label_field", None)
    if label is not None and not whole:
        raise PrepareError(
            f"--label-field {label}: it says what a whole text is, not a piece that is cut from it: give --no-cut, or "
            "--prefix-field where records are cut already; or leave it out and let a judge vote (--teacher-url)"
        )
    tokenizer = None if args.no_cut else args.tokenizer or args.hf_config
    if not whole and tokenizer is None:
        raise PrepareError("--tokenizer DIR (or --hf-config) is needed to cut documents; --no-cut takes them whole")
    tasks = TaskSettings(args.seq_length, args.suffix_length, args.task_mode, args.seed, args.min_prefix_length)
    return CutSettings(tasks, tokenizer, whole)


def output_settings(args: argparse.Namespace, balance: str | None) -> OutputSettings:
    """Where records go."""
    return OutputSettings(Path(args.out), tuple(dict.fromkeys(args.format)), balance, args.seed)


def quality_settings(args: argparse.Namespace) -> QualitySettings:
    """How suffixes are spoilt. Raises PrepareError, SettingsError."""
    rules = tuple(dict.fromkeys(args.corrupt or [TEACHER]))
    corruptor = None
    if TEACHER in rules:
        if not args.teacher_url:
            raise PrepareError(
                f"--teacher-url is needed: the model that spoils suffixes; or --corrupt {next(iter(RULES))}, which needs none"
            )
        corruptor = CorruptorSettings(
            client=client_settings(args, "teacher"),
            temperature=args.corrupt_temperature,
            top_p=args.corrupt_top_p,
            max_tokens=args.corrupt_max_tokens,
            deadline_s=args.judge_deadline,
            prefix_chars=args.judge_prefix_chars,
            seed=args.seed,
        )
    criterion = str(Path(args.criterion).resolve()) if args.criterion.endswith(".txt") else args.criterion
    return QualitySettings(rules, corruptor, args.seed, criterion)  # records are read from other folders


def label_votes(args: argparse.Namespace) -> VoteSettings | None:
    """The judge who says what is safe; None where --label-field does. Raises PrepareError, SettingsError."""
    if args.label_field is not None:
        return None
    if not args.teacher_url:
        raise PrepareError(
            "--teacher-url is needed: the judge who votes; or --label-field, where documents are labelled"
        )
    return vote_settings(args, "safety")


def vote_settings(args: argparse.Namespace, criterion: str) -> VoteSettings:
    """A judge who writes its verdicts. Raises SettingsError."""
    if args.votes < 1:
        raise PrepareError(f"--votes {args.votes}: at least 1 is needed")
    return VoteSettings(
        JudgeSettings(
            criteria={criterion: 1.0},
            client=client_settings(args, "teacher"),
            votes=args.votes,
            default_verdict="hard",
            temperature=args.judge_temperature,
            top_p=args.judge_top_p,
            max_tokens=args.judge_max_tokens,
            deadline_s=args.judge_deadline,
            prefix_chars=args.judge_prefix_chars,
            audit_rate=0.0,
        )
    )


def group_settings(args: argparse.Namespace) -> GroupSettings:
    """Which recorded judgements become labels. Raises PrepareError, DataError."""
    return GroupSettings(
        folder=Path(args.from_groups),
        splits=shares_of(args),
        agreement=args.agreement,
        min_votes=args.min_votes,
        one_order=args.one_order,
        per_group=args.per_group,
        seed=args.seed,
    )


def shares_of(args: argparse.Namespace) -> Shares:
    """Who may read what. Raises DataError."""
    return Shares(parse_shares(args.role_shares, "--role-shares", ROLES), parse_shares(args.split, "--split", SPLITS))
