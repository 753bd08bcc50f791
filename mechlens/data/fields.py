"""Find the pair of a row: in two of its fields, or in a conversation.

Fields have the names that the user gives, or known names if only one choice is possible. A conversation is a
list of messages in the format of OpenAI, TRL or ShareGPT; only one of one question and one answer is a pair.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mechlens.core.errors import DataError, SpecError
from mechlens.data.faults import Fault
from mechlens.data.text_rows import DECODER

PROMPTS = ("prompt", "instruction", "question", "query")
COMPLETIONS = ("completion", "response", "output", "answer")
CONVERSATIONS = ("messages", "conversations")
SYSTEMS = ("system", "system_prompt")
PROMPT_PARTS = ("input", "context", "history")
"""Further parts of a prompt.

Alpaca's `input` is added after its instruction; a row with another part that is not empty is refused, unless
its prompt and completion have exactly these names.
"""
KNOWN = (*CONVERSATIONS, *PROMPTS, *COMPLETIONS, *SYSTEMS, *PROMPT_PARTS)
UNKNOWN = "no fields that are known to hold a pair"
SEVERAL = "more than one field may hold the pair"
MISSING = "lacks a field that was named for the pair"
HOW_TO_NAME = (
    "Name them with --prompt-field NAME --completion-field NAME (`mechlens convert`, "
    "`screen` and `audit` take both)"
)
LISTED = 20
"""most columns that a message names"""
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


class Fields(NamedTuple):
    """The fields that a user named."""

    prompt: str
    completion: str
    required: bool = True
    """Whether a row without these fields is bad; otherwise the known names are tried."""

    def preferred(self) -> Fields:
        """The same names for a file that may have other names, such as a reference."""
        return self._replace(required=False)

    def stand_in(self, names: Collection[str]) -> bool:
        """Whether both fields are among these names."""
        return self.prompt in names and self.completion in names


def fields_from_flags(prompt: str, completion: str) -> Fields | None:
    """The fields that two flags name; None if neither flag is given.

    Raises:
        SpecError: if only one flag is given, or both name the same field.
    """
    if not prompt and not completion:
        return None
    if not prompt or not completion or prompt == completion:
        raise SpecError(
            f"--prompt-field {prompt!r} and --completion-field {completion!r} name no pair; "
            "give both, with different fields"
        )
    return Fields(prompt, completion)


def flags_of(fields: Fields | None) -> list[str]:
    """The flags of a command line that name these fields."""
    return (
        [] if fields is None else ["--prompt-field", fields.prompt, "--completion-field", fields.completion]
    )


def columns_of(names: Sequence[str], fields: Fields | None) -> list[str]:
    """The columns of a table that may contain its pairs; only these are read.

    Raises:
        DataError: if there are none. The message says what to do, but the caller adds the file's name.
    """
    if fields is not None and fields.stand_in(names):
        return list(dict.fromkeys([fields.prompt, fields.completion]))
    if fields is not None and fields.required:
        raise DataError(
            f"has the columns {listed(names)}, and no {fields.prompt!r} with {fields.completion!r}"
        )
    exact = {"prompt", "completion"} <= set(names)
    wanted = [
        name
        for name in names
        if name in ((*CONVERSATIONS, "prompt", "completion", *SYSTEMS) if exact else KNOWN)
    ]
    if not set(wanted) & set(CONVERSATIONS) and not (
        set(wanted) & set(PROMPTS) and set(wanted) & set(COMPLETIONS)
    ):
        raise DataError(
            f"has the columns {listed(names)}; expected prompt and completion, or messages. {HOW_TO_NAME}"
        )
    return wanted


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message, only the first ones if there are many."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"{[name[:50] for name in names[:LISTED]]}{more}"


def pair_of(row: Mapping[str, Any], fields: Fields | None) -> Pair | Fault:
    """The pair of a row, or the row's fault."""
    if fields is not None and (fields.required or fields.stand_in(row)):
        if not fields.stand_in(row):
            return Fault(
                MISSING,
                f"its fields are {listed(list(row))}, expected {fields.prompt!r} and {fields.completion!r}",
            )
        return _pair_of_values(row, fields.prompt, fields.completion)
    if (
        row.get("messages") is not None
    ):  # in a table of both forms, a row has null in the other form's columns
        return pair_of_messages(row["messages"])
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _with_system(_pair_of_values(row, "prompt", "completion"), row)
    if row.get("conversations") is not None:
        return pair_of_messages(row["conversations"])
    return _by_known_names(row)


def _with_system(pair: Pair | Fault, row: Mapping[str, Any]) -> Pair | Fault:
    """The pair, marked if the row has a system line: what it says would be lost without a word."""
    if isinstance(pair, Fault):
        return pair
    return pair._replace(system=pair.system or any(row.get(name) for name in SYSTEMS))


def _by_known_names(row: Mapping[str, Any]) -> Pair | Fault:
    prompts, completions = (
        [name for name in known if row.get(name) is not None] for known in (PROMPTS, COMPLETIONS)
    )
    if len(prompts) > 1 or len(completions) > 1:
        return Fault(SEVERAL, f"of {listed(prompts)} and {listed(completions)}, one each")
    if not prompts or not completions:
        if empty := sorted(
            name for name in (*CONVERSATIONS, *PROMPTS, *COMPLETIONS) if name in row and row[name] is None
        ):
            return Fault(f"{empty[0]} is null", f"its fields are {listed(list(row))}")
        return Fault(UNKNOWN, f"its fields are {listed(list(row))}")
    parts = [name for name in PROMPT_PARTS if row.get(name)]
    pair = _with_system(_pair_of_values(row, prompts[0], completions[0]), row)
    if isinstance(pair, Fault):
        return pair
    if parts == ["input"] and prompts == ["instruction"]:
        added = row["input"]
        return (
            pair._replace(prompt=f"{pair.prompt}\n\n{added}")
            if isinstance(added, str)
            else _no_text("input", added)
        )
    if parts:
        return Fault(
            f"{prompts[0]} may not be the whole prompt",
            f"the row also has {parts[0]}; put both into one field",
        )
    return pair


def _pair_of_values(row: Mapping[str, Any], prompt: str, completion: str) -> Pair | Fault:
    """The pair of two fields: two texts, or TRL's two lists of messages."""
    question, answer = row[prompt], row[completion]
    if isinstance(question, str) and isinstance(answer, str):
        return Pair(question, answer)
    if _is_conversation(question) and _is_conversation(answer):
        return pair_of_messages([*question, *answer])
    if not isinstance(question, str) and not (_is_conversation(question) and isinstance(answer, str)):
        return _no_text(prompt, question)
    return _no_text(completion, answer) if not isinstance(answer, str) else _no_text(prompt, question)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _no_text(name: str, value: object) -> Fault:
    """The fault of a value that should be a text.

    Lists of numbers are not joined to a text: the separators are part of what students learn.
    """
    if value is None:
        return Fault(f"{name} is null")
    if isinstance(value, bool | int | float):
        return Fault(f"{name} is a number, expected a text", repr(value)[:20])
    if isinstance(value, bytes):
        return Fault(f"{name} is binary, expected a text")
    if (
        isinstance(value, list)
        and value
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    ):
        return Fault(
            f"{name} is a list of numbers, expected the text that a model would write",
            f"{str(value)[1:-1][:30]!r} for {str(value)[:30]}",
        )
    kinds = {dict: "an object", list: "a list of messages" if _is_conversation(value) else "a list"}
    return Fault(f"{name} is {kinds.get(type(value), type(value).__name__)}, expected a text")


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
