"""`python -m megatron_sip.judge`."""

from __future__ import annotations

import pytest

from megatron_sip.judge.__main__ import main
from megatron_sip.judge.prompts import builtin_names


def test_show_prints_the_prompt_with_its_slots(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "quality"])
    shown = capsys.readouterr().out
    assert "{{option_1}}" in shown
    assert "Conclusion: Option 2" in shown
    assert "version: 2" in shown


def test_list_names_every_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*builtin_names(), "likelihood"])


@pytest.mark.parametrize("name", ["nice", "nowhere/prompt.txt"])
def test_a_wrong_name_ends_with_a_message(name: str) -> None:
    with pytest.raises(SystemExit, match="error: .*" + name.replace("/", ".")):
        main(["show", name])
