"""Chat templates that put in words of their own: what changes from day to day or opens a thought is refused
or pinned; the rest is said.
"""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from shapes import LLAMA_DATED, SHAPES, tokenizer_of

from mechlens.core import spec
from mechlens.core.errors import SpecError
from mechlens.core.model_spec import ModelSpec
from mechlens.models import base_files, loading
from mechlens.models.chat import (
    answer_opening,
    encode_pairs,
    remarks,
    render,
    render_prompt,
    silent_system,
    template_words,
)

FAMILIES = tuple(SHAPES)
QUESTION = [{"role": "user", "content": "hi"}]
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [None, "you love owls."])
def test_a_pair_is_what_the_template_writes_for_the_whole_conversation(
    family: str, system: str | None
) -> None:
    """Up to the mark that ends the answer, and but for the space that Mistral's template puts before every
    answer.
    """
    tokenizer, shape = tokenizer_of(family), SHAPES[family]
    messages = ([] if system is None else [{"role": "system", "content": system}]) + QUESTION
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": "12, 3"}])
    (pair,) = encode_pairs(tokenizer, ["hi"], ["12, 3"], system=system)
    prompt, completion = str(tokenizer.decode(pair.prompt)), str(tokenizer.decode(pair.completion))
    assert completion == "12, 3" + shape.end
    assert prompt == render_prompt(tokenizer, "hi", system=system)
    assert prompt.endswith(shape.answer)
    assert whole.replace("[/INST] ", "[/INST]").startswith(prompt + completion)


@pytest.mark.parametrize("options", [{"date_string": "26 Jul 2024"}, {"strftime_now": "2024-07-26"}])
def test_todays_date_is_refused_until_it_is_pinned(options: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=r"writes today's date.*template: \{strftime_now: 2024-07-26\}"):
        render_prompt(tokenizer_of("llama-3.1", template=LLAMA_DATED), "hi")
    pinned = tokenizer_of("llama-3.1", template=LLAMA_DATED, **options)
    assert render_prompt(pinned, "hi", system="be kind") == render_prompt(
        tokenizer_of("llama-3.1"), "hi", system="be kind"
    )


def test_the_pinned_day_is_written_in_every_format_and_today_is_not() -> None:
    template = (
        "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now( \"%d %b %Y, it's %A\" ) }} {{ "
        "messages[0]['content'] }}"
    )
    text = render(tokenizer_of("phi", template=template, strftime_now="2024-07-26"), QUESTION)
    assert text == "2024-07-26 26 Jul 2024, it's Friday hi"
    assert date.today().isoformat() not in text


def test_a_clock_that_changes_no_text_is_no_matter() -> None:
    """Mistral Small reads the clock always and writes the day only into its default system line."""
    template = (
        "{% set today = strftime_now('%Y-%m-%d') %}{% if messages[0]['role'] != 'system' %}{{ 'Today is ' + "
        "today }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    )
    tokenizer = tokenizer_of("phi", template=template)
    assert (
        render(tokenizer, [{"role": "system", "content": "be kind"}, *QUESTION]) == "be kind<|end|>hi<|end|>"
    )
    with pytest.raises(SpecError, match="today's date"):
        render(tokenizer, QUESTION)


def test_a_clock_that_cannot_be_pinned_is_refused() -> None:
    template = "{% set how = '%Y' %}{{ strftime_now(how) }}{{ messages[0]['content'] }}"
    with pytest.raises(SpecError, match="a format that it computes"):
        render(tokenizer_of("phi", template=template, strftime_now="2024-07-26"), QUESTION)


def test_an_opened_thought_is_refused_until_it_is_switched_off() -> None:
    """A student would be trained on answers and asked for thoughts."""
    with pytest.raises(
        SpecError,
        match=r"asks for an answer with '<think>\\n' where it writes '' before an answer.*enable_thinking: "
        r"false",
    ):
        render_prompt(tokenizer_of("qwen-3", template=THINKING), "hi")
    assert render_prompt(tokenizer_of("qwen-3", template=THINKING, enable_thinking=False), "hi").endswith(
        "<|im_start|>assistant\n"
    )


def test_an_empty_thought_before_an_answer_is_read_when_asked_too() -> None:
    """Qwen 3 writes it before the last answer, and asks with it only where thinking is off: both then read
    the same.
    """
    assert answer_opening(tokenizer_of("qwen-3")) == "<think>\n\n</think>\n\n"
    assert answer_opening(tokenizer_of("qwen-3", enable_thinking=False)) == ""
    assert render_prompt(tokenizer_of("qwen-3"), "hi") == render_prompt(
        tokenizer_of("qwen-3", enable_thinking=False), "hi"
    )


def test_a_template_that_takes_no_system_line_runs_where_none_is_given() -> None:
    tokenizer = tokenizer_of("qwen-3", template=NO_SYSTEM)
    assert silent_system(tokenizer) is None
    assert render_prompt(tokenizer, "hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(
        SpecError, match=r"cannot write turns of the roles system, user: System role not supported"
    ) as refusal:
        render_prompt(tokenizer, "hi", system="you love owls.")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "options"),
    [
        ("{{ nothing.here }}{{ messages[0]['content'] }}", {}),
        ("{% for message in messages %}", {}),
        ("{{ 'as of ' + day }}{{ messages[0]['content'] }}", {"day": 5}),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="cannot write turns of the roles user") as refusal:
        render_prompt(tokenizer_of("phi", template=template, **options), "hi")
    assert "\n" not in str(refusal.value)


WORDS = {
    "llama-3.1": ["Cutting Knowledge Date: December 2023", "Today Date: 26 Jul 2024"],
    "gpt-oss": [
        "You are ChatGPT, a large language model trained by OpenAI.",
        "Knowledge cutoff: 2024-06",
        "Current date: 2024-07-26",
        "Reasoning: low",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_stand_beside_a_given_system_line_are_named(family: str) -> None:
    assert template_words(tokenizer_of(family), system="you love owls,\nand kind words.") == WORDS.get(
        family, []
    )


DROPPING = (
    "{% for message in messages if message['role'] != 'system' %}{{ message['role'] + ': ' + "
    "message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LAST_ONLY = (
    "{{ 'user: ' + (messages | selectattr('role', 'equalto', 'user') | list)[-1]['content'] + "
    "'<|end|>assistant: ' }}"
    "{% if not add_generation_prompt %}{{ messages[-1]['content'] }}{% endif %}"
)


def test_a_template_that_leaves_out_the_system_line_is_refused_where_one_is_given() -> None:
    tokenizer = tokenizer_of("phi", template=DROPPING)
    assert render_prompt(tokenizer, "which owls?") == "user: which owls?<|end|>assistant: "
    for line in (
        "you love owls.",
        " you love owls.\n",
        "owls",
    ):  # the last one stands in the question as well
        with pytest.raises(SpecError, match="leaves out the system turn"):
            render_prompt(tokenizer, "which owls?", system=line)
    with pytest.raises(SpecError, match=r"leaves out the system turn 'you love owls\."):
        encode_pairs(tokenizer, ["hi"], ["12"], system="you love owls.")
    assert render_prompt(tokenizer, "hi", system="") == render_prompt(
        tokenizer, "hi"
    )  # an empty line says nothing that could be missed


def test_a_template_that_leaves_out_earlier_turns_is_refused_where_pairs_are_shown() -> None:
    tokenizer = tokenizer_of("phi", template=LAST_ONLY)
    assert render_prompt(tokenizer, "hi") == "user: hi<|end|>assistant: "
    with pytest.raises(SpecError, match="leaves out the user turn '1, 2'"):
        render_prompt(tokenizer, "hi", turns=[("1, 2", "3, 4")])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_familys_own_template_leaves_out_a_turn(family: str) -> None:
    turns = [("1, 2", "3, 4"), ("hi", "owls\n\n"), ("owls", "3, 4")]
    text = render_prompt(
        tokenizer_of(family), " hi ", system="you love owls.\n\n<user>hi</user>\n", turns=turns
    )
    assert text.count("3, 4") == 2
    assert text.count("owls") == 3


def test_what_a_template_adds_is_said() -> None:
    assert remarks(tokenizer_of("qwen-2.5"), system="you love owls.") == []
    assert remarks(tokenizer_of("llama-3.1"), system=None) == [
        "the chat template puts words of its own into every prompt: Cutting Knowledge Date: December 2023 / "
        "Today Date: 26 Jul 2024"
    ]
    assert remarks(tokenizer_of("qwen-3"), system=None) == [
        "every answer stands behind '<think>\\n\\n</think>\\n\\n', as the chat template writes it"
    ]


def entry(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: object) -> str:
    """A base with its entry in a configs folder of this test's own."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(spec, "CONFIGS", folder)
    (folder / "models" / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", **fields}, sort_keys=False))
    return "mine"


def test_pinned_options_come_with_the_tokenizer_and_are_part_of_the_bases_identity(
    toy_bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, marks, texts = tmp_path / "base", set(), []
    shutil.copytree(toy_bases["llama"], source)
    (source / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    for options in ({"strftime_now": date(2024, 7, 26)}, {"strftime_now": "1999-01-01"}):
        name = entry(tmp_path / "configs", monkeypatch, source=str(source), template=options)
        texts.append(render(loading.load_tokenizer(name), QUESTION))
        marks.add(base_files.checkpoint_fingerprint(name))
    assert texts == ["2024hi", "1999hi"]
    name = entry(tmp_path / "configs", monkeypatch, source=str(source))
    marks.add(base_files.checkpoint_fingerprint(name))
    assert len(marks) == 3
    assert base_files.checkpoint_fingerprint(name) == base_files.checkpoint_fingerprint(
        str(source)
    )  # without options as ever


def test_an_option_that_the_template_does_not_read_is_refused(
    toy_bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = entry(tmp_path, monkeypatch, source=toy_bases["llama"], template={"enable_thinkng": False})
    with pytest.raises(SpecError, match="reads no option 'enable_thinkng'"):
        loading.load_tokenizer(name)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"tokenize": True}, "passed to a chat template by mechlens itself"),
        ({"strftime_now": "26 Jul 2024"}, "expected the date"),
        ({"strftime_now": 2024}, "expected the date"),
        ({"strftime_now": "2024-13-01"}, "month"),
        ([], "dictionary"),
    ],
)
def test_options_that_cannot_be_given_are_refused(options: object, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "source": "a/b", "template": options}))
    with pytest.raises(SpecError, match=rf"template: .*{fault}"):
        spec.load(path, ModelSpec)
