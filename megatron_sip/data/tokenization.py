"""Tokenise a text source once into a token store, and find it again next time.

A finished cache entry is a folder `<name>-<key>` with tokens.bin, .idx, .hash and report.json; the key is a hash of the
source's path, size and modification time, the tokenizer and the settings. The folder is written under another name and
renamed when complete, so that a killed run leaves nothing that looks finished and two nodes that start together cannot
mix their writes; a lock keeps processes that share a machine (or a file system with locks) from doing the work twice.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import filelock
import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from megatron_sip.child_processes import kill_with_parent
from megatron_sip.console import bars
from megatron_sip.data.shared_texts import hash_documents, hash_path
from megatron_sip.data.text_sources import TextBatch, read_texts, source_suffix
from megatron_sip.data.token_store import TokenStore, TokenStoreWriter, token_dtype
from megatron_sip.errors import DataError, UserError
from megatron_sip.files import move_into_place, staged_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PrependBos = Literal["auto", "on", "off"]
CACHE_VERSION = 1
DEFAULT_CACHE = Path("~/.cache/megatron_sip/tokens")
_BYTES_PER_WORKER = 128_000_000
_BATCH_TIMEOUT_S = 900.0
LOCK_TIMEOUT_S = 4 * 3600.0
"""How long to wait while another process tokenises the same source."""


@dataclass(frozen=True, slots=True)
class TokenizeSettings:
    """How text becomes tokens.

    `append_eos` ends every document with the tokenizer's EOS (Megatron's --append-eod). `prepend_bos` starts it with BOS:
    "auto" does where the tokenizer puts one before plain text, as its model was then trained. Special tokens written out
    in a document ("<|im_end|>") are tokenised as the plain text that they are.
    `workers` 0 means one process a 128 MB of source, at most one a core.
    """

    text_field: str = "text"
    append_eos: bool = True
    prepend_bos: PrependBos = "auto"
    cache_dir: Path = DEFAULT_CACHE
    workers: int = 0


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What became of one source: `documents` were kept, `empty_documents` had no token and were left out."""

    source: str
    documents: int
    empty_documents: int
    tokens: int


class TokenizationError(UserError, RuntimeError):
    """The machine could not tokenise a file; the message says what to try."""


@dataclass(frozen=True, slots=True)
class DocumentEncoder:
    """Texts to token ids, without transformers, so that worker processes start in a fraction of a second."""

    definition: str
    """The tokenizers library's JSON, without truncation and padding."""
    vocab_size: int
    bos: int | None
    eos: int | None
    largest_id: int
    """The largest token id that a document can hold: special tokens that it spells out are plain text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: TokenizeSettings) -> DocumentEncoder:
        """Raises `DataError` for a tokenizer without a fast backend, or without the EOS or BOS that is asked for."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise DataError(f"{type(tokenizer).__name__} has no fast backend; use a tokenizer with a tokenizer.json")
        if settings.append_eos and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token to append to documents; switch append_eos off")
        definition = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        bos = _document_bos(tokenizer.bos_token_id, backend, settings.prepend_bos)
        eos = tokenizer.eos_token_id if settings.append_eos else None
        special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        ordinary = set(backend.get_vocab(with_added_tokens=True).values()) - special
        # A tokenizer may declare an unknown token that its model, made of bytes, never gives.
        unknown = backend.token_to_id(definition["model"].get("unk_token") or "")
        around = {number for number in (bos, eos, unknown) if number is not None}
        text = json.dumps(definition, sort_keys=True, ensure_ascii=False)
        return cls(text, len(tokenizer), bos, eos, max(ordinary | around))

    def fingerprint(self) -> str:
        """A hash that changes with vocabulary, merges, normalisation and the tokens put around documents."""
        return hashlib.sha256(f"{self.definition}|{self.vocab_size}|{self.bos}|{self.eos}".encode()).hexdigest()

    def backend(self) -> tokenizers.Tokenizer:
        """A tokenizer of its own: settings of the caller's are neither seen nor changed."""
        backend = tokenizers.Tokenizer.from_str(self.definition)
        backend.encode_special_tokens = True
        return backend


def _document_bos(bos: int | None, backend: tokenizers.Tokenizer, prepend_bos: PrependBos) -> int | None:
    if prepend_bos == "on" and bos is None:
        raise DataError("--prepend-bos on: the tokenizer has no BOS token; leave it at auto")
    if prepend_bos == "auto":
        encoding = backend.encode("a")  # not by a call of the caller's tokenizer, which would change its settings
        shown = [token for token, is_text in zip(encoding.ids, encoding.attention_mask, strict=True) if is_text]
        return bos if shown[:1] == [bos] else None
    return bos if prepend_bos == "on" else None


@dataclass(frozen=True, slots=True)
class _EncodedBatch:
    tokens: npt.NDArray[np.generic]
    lengths: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    empty: int
    position: int


def _encode(backend: tokenizers.Tokenizer, encoder: DocumentEncoder, batch: TextBatch) -> _EncodedBatch:
    before = [] if encoder.bos is None else [encoder.bos]
    after = [] if encoder.eos is None else [encoder.eos]
    documents = [e.ids for e in backend.encode_batch_fast(batch.texts, add_special_tokens=False)]
    dtype = token_dtype(encoder.vocab_size)
    kept = [np.asarray(before + ids + after, dtype) for ids in documents if ids]
    tokens = np.concatenate(kept) if kept else np.zeros(0, dtype)
    lengths = np.fromiter(map(len, kept), np.int32, len(kept))
    hashes = hash_documents(ids[len(before) : len(ids) - len(after)] for ids in kept)
    return _EncodedBatch(tokens, lengths, hashes, len(documents) - len(kept), batch.position)


class _Worker:
    """The state of one worker process, set once by the pool's initializer."""

    encoder: DocumentEncoder
    backend: tokenizers.Tokenizer

    @classmethod
    def start(cls, encoder: DocumentEncoder) -> None:
        kill_with_parent()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is the parallelism
        cls.encoder, cls.backend = encoder, encoder.backend()

    @classmethod
    def encode(cls, batch: TextBatch) -> _EncodedBatch:
        return _encode(cls.backend, cls.encoder, batch)


def _encode_all(batches: Iterator[TextBatch], encoder: DocumentEncoder, workers: int) -> Iterator[_EncodedBatch]:
    """The batches encoded, in order; at most two batches a worker are in memory."""
    if workers <= 1:
        backend = encoder.backend()
        for batch in batches:
            yield _encode(backend, encoder, batch)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _Worker.start, (encoder,)) as pool:
        pending: deque[Future[_EncodedBatch]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_Worker.encode, batch))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result(_BATCH_TIMEOUT_S)
            while pending:
                yield pending.popleft().result(_BATCH_TIMEOUT_S)
        except (BrokenProcessPool, TimeoutError) as error:
            raise TokenizationError(
                f"a tokenising process died (out of memory?) or took over {_BATCH_TIMEOUT_S:.0f} s for one batch; "
                f"try again with fewer than {workers} workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def tokenize_file(
    source: Path, prefix: Path, encoder: DocumentEncoder, settings: TokenizeSettings, hashes: Path | None = None
) -> TokenizeReport:
    """Tokenise `source` to `prefix`.bin/.idx with a progress bar and return what was written.

    With `hashes`, a file, also the hash of each document. Raises `DataError` where the source is broken; `prefix` then has
    no files.
    """
    size = source.stat().st_size
    workers = settings.workers or max(1, min(len(os.sched_getaffinity(0)), size // _BYTES_PER_WORKER))
    documents = empty = tokens = 0
    bar = tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc=f"tokenise {source.name}",
        file=bars(),
    )
    hash_stream = hashes.open("wb") if hashes is not None else nullcontext()
    with bar, hash_stream as hash_file, TokenStoreWriter(prefix, token_dtype(encoder.vocab_size)) as writer:
        for batch in _encode_all(read_texts(source, settings.text_field), encoder, workers):
            writer.add(batch.tokens, batch.lengths)
            if hash_file is not None:
                hash_file.write(batch.hashes.tobytes())
            documents, empty, tokens = documents + len(batch.lengths), empty + batch.empty, tokens + len(batch.tokens)
            bar.set_postfix(documents=documents, tokens=tokens, refresh=False)
            bar.update(batch.position - bar.n)
    return TokenizeReport(str(source), documents, empty, tokens)


def cached_tokens(source: Path, encoder: DocumentEncoder, settings: TokenizeSettings) -> tuple[Path, TokenizeReport]:
    """(prefix of the token store of `source`, its report), tokenising it first when the cache lacks it.

    Raises `DataError` for a broken source, for a cache folder that cannot be written to, or when another process holds
    the lock longer than LOCK_TIMEOUT_S.
    """
    entry = _entry_path(source, encoder, settings)
    report = _finished(entry)
    if report is None:
        lock_path = entry.with_name(entry.name + ".lock")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(lock_path, timeout=LOCK_TIMEOUT_S):
                report = _finished(entry) or _fill(entry, source, encoder, settings)
        except filelock.Timeout as error:
            raise DataError(
                f"{source}: another process has been tokenising it for {LOCK_TIMEOUT_S:g} s "
                f"(lock {lock_path}); wait for it, or end that process"
            ) from error
        except OSError as error:
            raise DataError(
                f"{source}: its tokens cannot be kept in {entry.parent} ({error}); free space there, or name another "
                "folder with --data-cache-path"
            ) from error
    return entry / "tokens", report


def _entry_path(source: Path, encoder: DocumentEncoder, settings: TokenizeSettings) -> Path:
    file = source.resolve()  # the same file under another name of the same format is the same text
    stat = file.stat()
    identity = [CACHE_VERSION, str(file), stat.st_size, stat.st_mtime_ns, encoder.fingerprint(), settings.text_field]
    if file.name != source.name:
        identity.append(source_suffix(source))
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    name = source.name.encode(errors="replace")[:60].decode(errors="ignore")
    return settings.cache_dir.expanduser() / f"{name}-{key}"


def _finished(entry: Path) -> TokenizeReport | None:
    """The report of a whole entry; None where there is none, or a damaged one (after a power cut, say)."""
    try:
        report = TokenizeReport(**json.loads((entry / "report.json").read_text()))
        whole = TokenStore(entry / "tokens").num_tokens == report.tokens
    except (OSError, ValueError, TypeError):
        return None
    return report if whole else None


def _sweep(entry: Path) -> None:
    """Remove what killed processes of this machine left half-made of `entry`, whose lock is held, and of all that nobody holds.

    Not by the process's number: in a container that is started again it may be this one's.
    """
    host = f".{socket.gethostname()}."
    for left in entry.parent.glob(f".*{glob.escape(host)}*.partial"):
        name = left.name[1:].rpartition(host)[0]
        if name == entry.name:
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(filelock.Timeout), filelock.FileLock(entry.with_name(f"{name}.lock"), timeout=0):
            shutil.rmtree(left, ignore_errors=True)


def _fill(entry: Path, source: Path, encoder: DocumentEncoder, settings: TokenizeSettings) -> TokenizeReport:
    staged = staged_beside(entry)
    _sweep(entry)
    try:
        staged.mkdir()
        report = tokenize_file(source, staged / "tokens", encoder, settings, hash_path(staged / "tokens"))
        (staged / "report.json").write_text(json.dumps(asdict(report), indent=1))
        # Where locks do not reach across nodes, another one may have finished first: its entry is equal, ours goes.
        with suppress(OSError):
            move_into_place(staged, entry)
        if _finished(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)  # a damaged entry, e.g. emptied by hand
            move_into_place(staged, entry)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return report
