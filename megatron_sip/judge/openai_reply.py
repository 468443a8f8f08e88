"""The parts of a chat completion, as far as they are there: servers leave out what a filter took, or write it in parts."""

from __future__ import annotations

from typing import Any

from megatron_sip.serving.failures import BadResponseError

TEXT_PARTS = (None, "text", "output_text")


def choices_of(response: Any) -> list[dict[str, Any]]:
    """The choices of a reply, each with a message, if an empty one. Raises BadResponseError when there is none."""
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not any(map(_is_choice, choices)):
        raise BadResponseError("no choices in the response")
    return [_with_message(choice if _is_choice(choice) else {}) for choice in choices]


def content_of(choice: dict[str, Any]) -> str:
    """The text of a choice; empty when a filter, or reasoning without an answer, left none."""
    content = choice["message"].get("content")
    parts = content if isinstance(content, list) else [content]
    return "".join(map(_part_text, parts))


def tokens_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The choice's tokens with their log-probs; none when the server gave none, or none of other tokens at their places."""
    listed = choice.get("logprobs")
    tokens = listed.get("content") if isinstance(listed, dict) else None
    if not tokens or any(token.get("top_logprobs") is None for token in tokens):
        return []
    return list(tokens)


def usage_of(response: dict[str, Any]) -> tuple[int, int]:
    """(prompt tokens, generated tokens), 0 where the server does not say."""
    usage = response.get("usage")
    found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [0, 0]
    prompt, generated = (value if type(value) is int and value > 0 else 0 for value in found)
    return prompt, generated


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or bool(choice.get("finish_reason")))


def _with_message(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    return {**choice, "message": message if isinstance(message, dict) else {}}


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        part = part.get("text")
    return part if isinstance(part, str) else ""
