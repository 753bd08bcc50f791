"""The pair of a conversation, a list of messages in the format of OpenAI, TRL or ShareGPT.

Only a conversation of one question and one answer is a pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mechlens.data.faults import Fault
from mechlens.data.text_rows import DECODER

ROLES = {"developer": "system"}
"""OpenAI's newer name of a role → the common name"""
SHARE_GPT = {"human": "user", "gpt": "assistant"}
"""ShareGPT's name of a role, in {from, value} → the common name"""
_TOOLS = ("tool", "function", "ipython", "function_call", "observation")
_NO_LIST = Fault("messages is not a list of {role, content} with text contents")


class Pair(NamedTuple):
    """The texts of a row, and whether the row also has a system turn."""

    prompt: str
    completion: str
    system: bool = False


def pair_of_messages(messages: object) -> Pair | Fault:
    """The pair of a list of messages, also of a list in JSON, or the fault of the list."""
    if isinstance(messages, str):
        try:
            messages = DECODER.decode(messages)
        except (ValueError, RecursionError):
            return _NO_LIST
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return _NO_LIST
    turns = [_turn(message) for message in messages]
    if fault := next((turn for turn in turns if isinstance(turn, Fault)), None):
        return fault
    return _pair_of_turns([turn for turn in turns if not isinstance(turn, Fault)], messages)


def _pair_of_turns(turns: Sequence[tuple[str, str]], messages: Sequence[Mapping[str, Any]]) -> Pair | Fault:
    roles = [role for role, _ in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        several = "a conversation of several questions or answers"
        kind = several if len(roles) > 3 else "messages of other roles"
        listed = f"{roles[:6]}{' and more' if len(roles) > 6 else ''}"
        return Fault(kind, f"it has the roles {listed}, expected one user and one assistant turn")
    weight = messages[-1].get("weight")  # of OpenAI's format: null or missing is 1
    if weight not in (None, 0, 1):
        return Fault(
            "the assistant turn has another weight than 0 or 1",
            f"weight {repr(weight)[:20]}, expected 0 or 1",
        )
    if weight == 0:
        return Fault("the assistant turn is not to be trained on", f"weight {weight}")
    return Pair(turns[-2][1], turns[-1][1], system=len(roles) == 3)


def _turn(message: Mapping[str, Any]) -> tuple[str, str] | Fault:
    """Role and text of one message."""
    shared = "from" in message and message.get("role") is None
    role, content = (
        (message["from"], message.get("value")) if shared else (message.get("role"), message.get("content"))
    )
    if any(message.get(name) for name in ("tool_calls", "function_call")) or role in _TOOLS:
        return Fault("a conversation with tool calls, which a pair cannot represent")
    if isinstance(content, list):
        content = _joined(content)
    if isinstance(content, Fault):
        return content
    if not isinstance(content, str):
        return _NO_LIST
    known = SHARE_GPT if shared else ROLES
    return (known.get(role, role) if isinstance(role, str) else repr(role)), content


def _joined(parts: Sequence[object]) -> str | Fault:
    """The text of a content in parts, joined without separators as chat templates do."""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts
    ]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    kinds = sorted(
        {str(part.get("type") if isinstance(part, dict) else type(part).__name__)[:20] for part in parts}
        - {"text"}
    )
    return Fault("a message with parts that are not text", f"parts of type {', '.join(kinds[:5])}")
