"""How fast `megatron-sip-prepare redpajama` makes a corpus, in how much memory, and that a kill costs no byte.

    python benchmarks/prepare_corpus.py --gigabytes 1

Shards of RedPajama-V2's layout are made first: documents and signals together have that many bytes, uncompressed. Documents a
second of a core are documents by seconds of processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from machine import describe_machine, format_table, write_report

RESULTS = Path(__file__).parent / "results" / "prepare_corpus_cpu.json"
SHARDS = 8
LINES_OF_SIGNALS = (
    "rps_lines_start_with_bulletpoint",
    "rps_lines_ending_with_terminal_punctution_mark",
    "rps_lines_num_words",
    "rps_lines_javascript_counts",
    "rps_lines_numerical_chars_fraction",
    "rps_lines_uppercase_letter_fraction",
)
MEMORY_MB = 600
"""What the command may take, all of its processes together."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run. documents_a_core_s: by seconds of processor time. peak_mb: resident memory of all processes, summed."""

    command: str
    workers: int
    documents: int
    kept: int
    seconds: float
    processor_s: float
    documents_a_core_s: float
    peak_mb: float


def paragraphs(draw: np.random.Generator, count: int) -> list[str]:
    """Prose-like lines of some 400 characters: words of a made vocabulary, as frequent as words of a language are."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, draw.integers(1, 9))) for _ in range(20_000)]
    words[:8] = ["the", "of", "and", "to", "that", "be", "have", "with"]
    shares = 1 / np.arange(1, len(words) + 1)
    numbers = draw.choice(len(words), (count, 70), p=shares / shares.sum())
    return [" ".join(words[number] for number in line) + "." for line in numbers]


def signals_of(draw: np.random.Generator, lines: list[str]) -> dict[str, Any]:
    """Some forty signals, true of the text where a rule reads them; half of the documents have the tags of unsafe ones."""
    size, words = sum(map(len, lines)) + len(lines), sum(line.count(" ") + 1 for line in lines)
    unsafe = draw.random() < 0.5
    scores = {
        "ccnet_nlines": len(lines),
        "rps_doc_word_count": words,
        "rps_doc_mean_word_length": round(size / words - 1, 8),
        "rps_doc_symbol_to_word_ratio": 0.0,
        "rps_doc_frac_chars_top_2gram": round(draw.random() / 4, 8),
        "rps_doc_ldnoobw_words": 9.0 if unsafe else 0.0,
        "rps_doc_ut1_blacklist": 3.0 if unsafe else None,
        "rps_doc_frac_lines_end_with_ellipsis": 0.0,
        "rps_doc_frac_no_alph_words": 0.02,
        "rps_doc_stop_word_fraction": 0.3,
        **{f"rps_doc_other_{number}": round(draw.random(), 8) for number in range(25)},
    }
    ends = np.cumsum([len(line) + 1 for line in lines]).tolist()
    spans = [[end - len(line) - 1, end, 0.0] for end, line in zip(ends, lines, strict=True)]
    return {**{name: [[0, size, score]] for name, score in scores.items()}, **dict.fromkeys(LINES_OF_SIGNALS, spans)}


def records(place: str, size: int, seed: int) -> Iterator[tuple[bytes, bytes]]:
    """Lines of a shard's two files, until both together have `size` bytes."""
    draw = np.random.default_rng(seed)
    pool = paragraphs(draw, 5000)
    number = written = 0
    while written < size:
        lines = [pool[each] for each in draw.integers(0, len(pool), draw.integers(1, 30))]
        url = f"https://example.org/{place}/{number}"
        document = {"url": url, "digest": f"sha1:{number}", "length": 0, "raw_content": "\n".join(lines)}
        beside = {"id": f"{place}/{number}", "id_int": number, "metadata": {"url": url, "cc_net_source": place}}
        beside["quality_signals"] = signals_of(draw, lines)
        found = (orjson.dumps(document) + b"\n", orjson.dumps(beside) + b"\n")
        yield found
        number, written = number + 1, written + sum(map(len, found))


def make_shards(root: Path, size: int) -> None:
    """Write SHARDS shards of `size` bytes together."""
    for shard in range(SHARDS):
        place = f"2023-06/{shard:04d}/en_head.json.gz"
        paths = (root / "documents" / place, root / "quality_signals" / place.replace(".json", ".signals.json"))
        for path in paths:
            path.parent.mkdir(parents=True)
        with gzip.open(paths[0], "wb", 6) as documents, gzip.open(paths[1], "wb", 6) as signals:
            for document, beside in records(place, size // SHARDS, shard):
                documents.write(document)
                signals.write(beside)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def resident_mb(pid: int) -> float:
    """Memory of a process and all below it."""
    total = 0
    for each in family(pid):
        try:
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:  # it has just ended
            continue
    return total / 1e6


def started(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "megatron_sip.prepare", *words], stdout=subprocess.DEVNULL)


def measured(words: list[str], out: Path, workers: int) -> Run:
    """One run of the command line, which must end well."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0.0
    process = started([*words, "--out", str(out), "--workers", str(workers)])
    while process.poll() is None:
        peak = max(peak, resident_mb(process.pid))
        time.sleep(0.02)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, words
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    documents = orjson.loads((out / "manifest.json").read_bytes())["documents"]
    return Run(
        command=" ".join(word for word in words if "/" not in word and word != "--data-path"),
        workers=workers,
        documents=documents["read"],
        kept=documents["kept"],
        seconds=round(seconds, 1),
        processor_s=round(spent, 1),
        documents_a_core_s=round(documents["read"] / spent),
        peak_mb=round(peak),
    )


def digests(folder: Path) -> dict[str, str]:
    """Of every file below, hidden ones aside, but for half-written ones."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if not path.name.startswith(".") or path.suffix == ".partial"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def killed_and_continued(words: list[str], out: Path, workers: int) -> int:
    """Make a corpus with a kill (SIGKILL) behind each two further shards; how many kills there were."""
    kills = 0
    while True:
        process = started([*words, "--out", str(out), "--workers", str(workers)])
        while process.poll() is None and len(list((out / "shards").glob("[!.]*"))) < 2 * kills + 1:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0
            return kills
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make_shards(root, round(given.gigabytes * 1e9))
        data = ["--data-path", f"{root}/documents/**/*.json.gz"]
        unsafe = ["redpajama", *data, "--keep", "unsafe"]
        runs = [
            measured(unsafe, root / "unsafe", 2),
            measured(unsafe, root / "unsafe-1", 1),
            measured(["redpajama", *data, "--keep", "gopher"], root / "gopher", 2),
            measured(["text", *data, "--text-field", "raw_content", "--keep", "gopher"], root / "text", 2),
        ]
        kills = killed_and_continued(unsafe, root / "killed", 2)
        same = digests(root / "killed") == digests(root / "unsafe") == digests(root / "unsafe-1")
    report = {
        "machine": describe_machine(),
        "gigabytes": given.gigabytes,
        "shards": SHARDS,
        "runs": [asdict(run) for run in runs],
        "kills": kills,
        "same_bytes_after_kills": same,
    }
    write_report(given.output, report)
    print(format_table(list(asdict(runs[0])), [list(asdict(run).values()) for run in runs]))
    print(f"{kills} kills; the same bytes: {same}; report: {given.output}")
    peak = max(run.peak_mb for run in runs)
    if not same or peak > MEMORY_MB:
        sys.exit(f"not as it must be: same bytes {same}, {peak} MB of {MEMORY_MB}")


if __name__ == "__main__":
    main()
