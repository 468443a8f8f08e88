"""Look at the judge's prompts, without a server.

python -m megatron_sip.judge list
python -m megatron_sip.judge show quality
python -m megatron_sip.judge show path/to/my_criterion.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_sip.judge.prompts import PromptError, PromptFile, builtin_names, builtin_prompt, read_prompt_file
from megatron_sip.judge.settings import LIKELIHOOD


def find_prompt(name: str) -> PromptFile:
    """A built-in prompt, or the prompt file of that path. Raises PromptError, FileNotFoundError."""
    return read_prompt_file(Path(name)) if name.endswith(".txt") else builtin_prompt(name)


def describe(prompt: PromptFile) -> str:
    """The prompt as text, slots in double braces, under a line for each of its settings."""
    lines = [
        f"name: {prompt.name}",
        f"version: {prompt.version}",
        f"kind: {prompt.kind}",
        f"about: {prompt.description}",
    ]
    if prompt.rule is not None:
        values = ", ".join(f"{label} = {value:g}" for label, value in prompt.rule.values.items())
        lines += [f"verdict: {prompt.rule.pattern.pattern}", f"values: {values}", f"soft start: {prompt.start!r}"]
        lines += ["position: anywhere"] if prompt.rule.anywhere else []
    if prompt.text_pattern is not None:
        lines.append(f"text: {prompt.text_pattern.pattern}")
    body = "".join("{{" + piece + "}}" if place % 2 else piece for place, piece in enumerate(prompt.body))
    return "\n".join(lines) + f"\nsource: {prompt.source}\n\n{body}"


def list_prompts() -> str:
    lines = [f"{name:22} {builtin_prompt(name).description}" for name in builtin_names()]
    return "\n".join([*lines, f"{LIKELIHOOD:22} Mean token log-prob under the judge's model; needs no prompt."])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sip.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the prompts")
    show = commands.add_parser("show", help="a prompt with its verdict pattern")
    show.add_argument("name", help="a name from the list, or the path of a prompt file (*.txt)")
    args = parser.parse_args(arguments)
    try:
        print(list_prompts() if args.command == "list" else describe(find_prompt(args.name)))
    except (PromptError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
