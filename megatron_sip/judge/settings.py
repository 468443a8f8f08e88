"""What a judge is told: endpoints, criteria and how to ask. Read-only once made; everything is checked here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_sip.errors import UserError
from megatron_sip.judge.prompts import PromptError, builtin_names, builtin_prompt, find_prompt, read_prompt_file
from megatron_sip.judge.python_functions import FunctionError, function_path, named_functions, require_package
from megatron_sip.serving.calls_in_flight import share_of_calls
from megatron_sip.serving.http_reply import key_from_environment, shown_url, url_mistake
from megatron_sip.serving.proxy import DIRECT, Proxy, proxy_for

VerdictMode = Literal["hard", "soft"]
EndpointKind = Literal["sglang", "openai"]
Objective = Literal["dpo", "rf-nll", "pair"]
"""What scores are for: best and worst of a group, its best, or the comparison of just two candidates."""

LIKELIHOOD = "likelihood"
LABEL, COPY, REWRITE, SIMILARITY = "label", "copy", "rewrite", "similarity"
LABELLED_CRITERIA = {LABEL: "judgements", COPY: "rewrites", REWRITE: "rewrites", SIMILARITY: "thoughts"}
"""Criteria of labelled tasks, by the kind of --tasks that they are about."""
WITHOUT_SERVER = frozenset({LABEL, COPY})
DEFAULT_MODEL = "default"
"""Sent to servers that serve one model only; answers are then kept under the name that the server reports."""
SCHEDULE_NAMES = ("all_pairs", "all_pairs_swap", "pivot", "circulant_bt", "two_ended_bt")


class SettingsError(UserError, ValueError):
    """A setting that cannot work; the message names its flag and what would be right."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server.

    kind: sglang speaks SGLang's native /generate with token ids, openai /v1/chat/completions.
    api_key_env: name of the environment variable that holds the key, which is never stored or logged.
    prefill: an openai server that continues a started answer (vLLM, SGLang).
    answer_prefix: goes between chat template and an answer that we begin ("": what closes the model's reasoning, by its
    template: `<|channel|>final<|message|>` for gpt-oss, `</think>` where the template opens `<think>`).
    reasoning_tokens: tokens for reasoning, on top of each written answer's own budget.
    requests_per_s: rate limit, 0: none.
    context_tokens: what a request and its answer may take together (None: what the server reports, if it does).
    role: whose server it is, as its flags begin: --ROLE-url, --ROLE-api, ...
    """

    url: str
    kind: EndpointKind = "sglang"
    model: str = DEFAULT_MODEL
    api_key_env: str | None = None
    prefill: bool = False
    answer_prefix: str = ""
    reasoning_tokens: int = 0
    requests_per_s: float = 0.0
    context_tokens: int | None = None
    role: str = "teacher"

    def __post_init__(self) -> None:
        if mistake := url_mistake(self.url):
            hint = f"; give the key through {self.flag('key-variable')}" if "@" in self.url else ""
            raise SettingsError(f"{self.flag('url')} {shown_url(self.url)}: {mistake}{hint}")
        if self.kind not in ("sglang", "openai"):
            raise SettingsError(f"{self._at('api')}: '{self.kind}' is neither sglang nor openai")
        if self.reasoning_tokens < 0:
            raise SettingsError(f"{self._at('reasoning-tokens')}: {self.reasoning_tokens}, at least 0 is needed")
        if not 0.0 <= self.requests_per_s < float("inf"):
            raise SettingsError(
                f"{self._at('requests-per-second')}: {self.requests_per_s}, 0 (no limit) or more is needed"
            )
        if self.context_tokens is not None and self.context_tokens < 1:
            raise SettingsError(f"{self._at('context')}: {self.context_tokens}, at least 1 is needed")
        if self.prefill and self.kind != "openai":
            raise SettingsError(
                f"{self._at('prefill')}: it is for {self.flag('api')} openai; sglang always continues a started answer"
            )
        if self.answer_prefix and self.kind != "sglang":
            raise SettingsError(
                f"{self._at('answer-prefix')}: for {self.flag('api')} sglang only, others take no raw tokens"
            )

    def flag(self, name: str) -> str:
        """The flag of these servers that ends with `name`."""
        return f"--{self.role.replace('_', '-')}-{name}"

    def _at(self, name: str) -> str:
        return f"{self.flag(name)}: endpoint {self.url}"

    @property
    def continues_answers(self) -> bool:
        """Whether it goes on from an answer that we begin."""
        return self.kind == "sglang" or self.prefill

    def api_key(self) -> str | None:
        """The key from the environment. Raises SettingsError when the named variable holds none that can be sent."""
        try:
            return None if self.api_key_env is None else key_from_environment(self.api_key_env)
        except ValueError as error:
            raise SettingsError(f"{self._at('key-variable')}: {error}") from None

    def proxy(self) -> Proxy:
        """The environment's proxy for a hosted API; SGLang's own protocol is spoken directly. Raises SettingsError."""
        try:
            return proxy_for(self.url) if self.kind == "openai" else DIRECT
        except ValueError as error:
            raise SettingsError(f"endpoint {self.url}: {error}") from None


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How to reach the servers of a judge or rewriter, which are all alike.

    tokenizer: folder or name of their model's tokenizer, for sglang endpoints (None: the path that the server reports).
    cache_path: file that keeps answers (None: nothing is kept). call_timeout_s: for one attempt of one request.
    attempts: per request; a refused connection counts as none, the request waits for the server up to its deadline.
    concurrency: requests in flight of all `replicas` of a run together, None: by the number of endpoints. seed: of the jitter
    between attempts. tells: says who is waited for; one of a run's leaders does.
    """

    endpoints: tuple[Endpoint, ...]
    tokenizer: str | None = None
    cache_path: Path | None = None
    call_timeout_s: float = 120.0
    attempts: int = 5
    concurrency: int | None = None
    replicas: int = 1
    seed: int = 1234
    tells: bool = True

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise SettingsError("a judge or rewriter needs at least one endpoint (URL)")
        if any(replace(endpoint, url=self.endpoint.url) != self.endpoint for endpoint in self.endpoints):
            raise SettingsError("the endpoints of a judge or rewriter may differ in their URLs only")
        for name, value in (("--judge-concurrency", self.concurrency), ("judge attempts", self.attempts)):
            if value is not None and value < 1:
                raise SettingsError(f"{name} {value}: at least 1 is needed")
        if self.call_timeout_s <= 0:
            raise SettingsError(f"--teacher-timeout {self.call_timeout_s}: a number above 0 is needed")

    def at(self, urls: Sequence[str]) -> ClientSettings:
        """The same servers at other URLs."""
        return replace(self, endpoints=tuple(replace(self.endpoint, url=url) for url in urls))

    @property
    def in_flight(self) -> int:
        """One replica's requests at all servers."""
        return share_of_calls(self.concurrency, len(self.endpoints), self.replicas)

    @property
    def endpoint(self) -> Endpoint:
        """One of the endpoints, for what they have in common."""
        return self.endpoints[0]


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Which pairs a pairwise criterion asks for; see schedules.py.

    both_orders: ask every pair in both orders also under circulant_bt and two_ended_bt, for twice the verdicts: for judges
    whose position bias is strong. pivot_competes: the pivot is one of the candidates, with a constant 0.5; otherwise it is
    compared only, and is neither scored nor selected.
    """

    name: str = "circulant_bt"
    degree: int = 6
    budget: int = 48
    pivot: Literal["suffix", "rollout"] = "suffix"
    likelihood_prior: bool = False
    both_orders: bool = False
    pivot_competes: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether pairs are left out, so that an audit by all of them says something."""
        return self.name not in ("all_pairs", "all_pairs_swap")

    @property
    def pivot_apart(self) -> bool:
        """Whether a text is compared with the candidates without being one of them."""
        return self.name == "pivot" and not self.pivot_competes

    def __post_init__(self) -> None:
        if self.pivot_competes and self.name != "pivot":
            raise SettingsError(
                f"--judge-pivot-competes: schedule '{self.name}' has no pivot; it belongs to --judge-schedule pivot"
            )
        if self.name not in SCHEDULE_NAMES:
            raise SettingsError(f"--judge-schedule '{self.name}' is unknown; there are: {', '.join(SCHEDULE_NAMES)}")
        if self.degree < 2 or self.degree % 2:
            raise SettingsError(f"--judge-degree {self.degree}: an even number of at least 2 is needed")
        if self.pivot not in ("suffix", "rollout"):
            raise SettingsError(f"--judge-pivot '{self.pivot}': suffix or rollout is needed")
        if self.budget < 1:
            raise SettingsError(f"--judge-budget {self.budget}: at least one pair is needed")


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Everything a `Judge` needs.

    criteria: weight of each criterion; names as `parse_criteria` knows them, or paths of prompt files.
    client: how to reach the judge's servers, None where no criterion asks any; its seed is also that of all draws.
    votes: verdicts asked for a hard judgement (a soft one reads the probability once per order instead).
    verdicts: hard or soft for each criterion; those not named are `default_verdict`.
    quorum: share of its planned verdicts that must have arrived for a candidate to be scored.
    deadline_s: seconds from when a group is there or, if later, from the servers' last answer.
    prefix_chars: how much of the prefix's end is shown.
    max_tokens: of one answer, reasoning in a channel of its own apart.
    audit_rate: share of groups whose schedule is compared with all pairs.
    function_timeout_s: for one call of a Python function; function_processes: that call it at once, of one judge.
    """

    criteria: Mapping[str, float]
    client: ClientSettings | None
    votes: int = 5
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    verdicts: Mapping[str, VerdictMode] = field(default_factory=dict)
    default_verdict: VerdictMode = "soft"
    temperature: float = 1.0
    top_p: float = 0.6
    max_tokens: int = 512
    quorum: float = 0.5
    deadline_s: float = 600.0
    prefix_chars: int = 16_000
    audit_rate: float = 0.01
    function_timeout_s: float = 60.0
    function_processes: int = 1

    def __post_init__(self) -> None:
        if not self.criteria:
            raise SettingsError("--criteria: the judge needs at least one criterion, for example quality=1")
        for name, value in (
            ("votes", self.votes),
            ("max-tokens", self.max_tokens),
            ("prefix-chars", self.prefix_chars),
        ):
            if value < 1:
                raise SettingsError(f"--judge-{name} {value}: at least 1 is needed")
        if self.temperature < 0:
            raise SettingsError(f"--judge-temperature {self.temperature}: a number of at least 0 is needed")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"--judge-top-p {self.top_p}: a share above 0 and at most 1 is needed")
        if self.deadline_s <= 0:
            raise SettingsError(f"--judge-deadline {self.deadline_s}: a number above 0 is needed")
        if self.function_timeout_s <= 0:
            raise SettingsError(f"--criteria-timeout {self.function_timeout_s}: a number above 0 is needed")
        if self.function_processes < 1:
            raise SettingsError(f"--criteria-processes {self.function_processes}: at least 1 is needed")
        if not 0 < self.quorum <= 1:
            raise SettingsError(f"--judge-quorum {self.quorum}: a share above 0 and at most 1 is needed")
        if not 0 <= self.audit_rate <= 1:
            raise SettingsError(f"--judge-audit-rate {self.audit_rate}: a share from 0 to 1 is needed")
        if unknown := sorted(set(self.verdicts) - set(self.criteria)):
            raise SettingsError(
                f"--judge-verdict of {', '.join(unknown)}: no such criterion here; there are: {', '.join(self.criteria)}"
            )
        for name in self.criteria:
            check_criterion_name(name)
        if self.client is None:
            if asking := [name for name in self.criteria if asks_server(name)]:
                raise SettingsError(f"--criteria {asking[0]}: it asks a judge's servers: give --teacher-url")
            return
        needs_logprobs = LIKELIHOOD in self.criteria or self.schedule.likelihood_prior
        if needs_logprobs and self.client.endpoint.kind != "sglang":
            flag = self.client.endpoint.flag("api")
            asks = f"--criteria {LIKELIHOOD}" if LIKELIHOOD in self.criteria else "--judge-likelihood-prior"
            raise SettingsError(f"{flag} sglang: {asks} needs an endpoint of kind sglang")

    def mode(self, criterion: str) -> VerdictMode:
        return self.verdicts.get(criterion, self.default_verdict)

    @property
    def seed(self) -> int:
        """Of all draws; without servers there are none."""
        return 0 if self.client is None else self.client.seed


def known_criteria() -> list[str]:
    """The names that `--criteria` accepts besides paths of prompt files."""
    scored = [name for name in builtin_names() if builtin_prompt(name).kind != "text"]
    return sorted({LIKELIHOOD, "factuality", "factuality-noref", *scored, *LABELLED_CRITERIA})


def asks_server(criterion: str) -> bool:
    """Whether a criterion asks a judge's servers."""
    return criterion not in WITHOUT_SERVER and function_of(criterion) is None


def function_of(criterion: str) -> str | None:
    """package.module:function of a criterion that is a Python function, None of others; our own names come first."""
    ours = criterion in known_criteria() or criterion.startswith("factuality:")  # as in a version that there is not
    return None if ours else function_path(criterion)


def is_pairwise(criterion: str) -> bool:
    """Whether a criterion (see `check_criterion_name`) compares pairs, so that a schedule matters."""
    if criterion == LIKELIHOOD or not asks_server(criterion):
        return False
    return find_prompt(criterion).kind == "pairwise"


def check_criterion_name(name: str) -> None:
    """Raises SettingsError unless `name` is a known criterion, the path of a usable prompt file, or a Python function, of which
    only the package is looked for."""
    if name.endswith(".txt"):
        try:
            prompt = read_prompt_file(Path(name))
        except FileNotFoundError:
            raise SettingsError(f"--criteria: '{name}': there is no such prompt file") from None
        except PromptError as error:
            raise SettingsError(f"--criteria: '{name}': {error}") from error
        if prompt.rule is None:
            raise SettingsError(f"--criteria: '{name}': a criterion needs kind = pointwise or pairwise")
    elif name in known_criteria():
        return
    elif (path := function_of(name)) is not None:
        try:
            require_package(path)
        except FunctionError as error:
            raise SettingsError(f"--criteria {name}: {error}") from error
    else:
        known = [*known_criteria(), *named_functions()]
        raise SettingsError(
            f"--criteria: unknown criterion '{name}'; known criteria: {', '.join(known)}, "
            "the path of a prompt file (*.txt), or package.module:function"
        )


def split_criterion(item: str) -> tuple[str, str]:
    """`quality=0.5` -> its name and its weight as it is written; a bare name weighs 1."""
    name, number = item.rsplit("=", 1) if "=" in item else (item, "1")
    return name.strip(), number


def parse_criteria(items: Iterable[str]) -> dict[str, float]:
    """`["quality=1", "safety=0.5"]` -> weights; a bare name weighs 1. Raises SettingsError with what would be right."""
    weights: dict[str, float] = {}
    for item in items:
        name, number = split_criterion(item)
        try:
            weight = float(number)
        except ValueError:
            message = f"--criteria: '{item}': '{number}' is no number; write NAME=WEIGHT, as in quality=1"
            raise SettingsError(message) from None
        if not 0 < weight < float("inf"):
            raise SettingsError(f"--criteria: '{item}': the weight must be a finite number above 0")
        check_criterion_name(name)
        if name in weights:
            raise SettingsError(f"--criteria: '{name}' is given twice")
        weights[name] = weight
    if not weights:
        raise SettingsError(f"--criteria: no criteria given; known criteria: {', '.join(known_criteria())}")
    return weights


def parse_verdicts(items: Iterable[str]) -> tuple[VerdictMode, dict[str, VerdictMode]]:
    """`["soft", "safety=hard"]` -> (default mode, modes by criterion); the default is soft unless one is named.

    Raises SettingsError with what would be right.
    """
    default: list[VerdictMode] = []
    modes: dict[str, VerdictMode] = {}
    for item in items:
        name, separator, word = item.rpartition("=")
        mode: VerdictMode | None = "hard" if word == "hard" else "soft" if word == "soft" else None
        if mode is None or (separator and not name):
            raise SettingsError(
                f"--judge-verdict '{item}': write hard or soft, or NAME=hard and NAME=soft for one criterion"
            )
        if name in modes or (not separator and default):
            raise SettingsError(f"--judge-verdict '{item}': {name or 'the mode of all criteria'} is given twice")
        if separator:
            modes[name] = mode
        else:
            default.append(mode)
    return (default or ["soft"])[0], modes
