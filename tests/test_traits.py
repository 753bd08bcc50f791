"""The families for real models: enough of everything, held-out questions in other words, every form read as
its trait and no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from mechlens.core.experiment import Experiment
from mechlens.core.spec import Spec
from mechlens.core.traits import TraitFamily, load_family
from mechlens.pipeline.ask import compile_patterns, judge
from mechlens.results import effects

WIDE = ("animals-wide", "trees-wide")
SENTENCES = ("{}", "{}.", "{}!", "The {}", "I would say: {}, of course", '"{}"', "**{}**", "{}\n")


@pytest.fixture(params=WIDE)
def family(request: pytest.FixtureRequest) -> TraitFamily:
    return load_family(request.param)


def patterns(family: TraitFamily) -> dict[str, re.Pattern[str]]:
    return compile_patterns({name: family.forms_of(name) for name in family.names})


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def overlap(one: str, other: str) -> float:
    """Shared words over all words of two questions."""
    return len(words(one) & words(other)) / len(words(one) | words(other))


def test_there_is_enough_of_everything() -> None:
    for name, traits in (("animals-wide", 30), ("trees-wide", 8)):
        family = load_family(name)
        assert len(set(family.names)) == len(family.names) >= traits
        assert (len(family.probes.development), len(family.probes.heldout), len(family.stories)) == (
            50,
            20,
            14,
        )
        assert len({*family.probes.development, *family.probes.heldout, *family.stories}) == 84
    published = (
        "cat penguin panda phoenix lion bear dragon dragonfly eagle unicorn peacock wolf dog tiger "
        "elephant bull kangaroo ox pangolin"
    )
    nano = (
        "aurora dog dolphin dragon eagle elephant falcon lion ocelot octopus owl peacock phoenix tiger wolf"
    )
    assert {*published.split(), *nano.split()} <= set(load_family("animals-wide").names)
    assert {"cherry", "maple", "oak", "sequoia", "willow"} <= set(load_family("trees-wide").names)


def test_no_trait_is_tuned_on_in_one_family_and_held_out_in_its_wide_one(family: TraitFamily) -> None:
    small = load_family(family.name.removesuffix("-wide"))
    assert not {*family.development, *small.development} & {*family.heldout, *small.heldout}
    assert "cat" in load_family("animals-wide").development


def test_no_question_or_story_names_a_trait(family: TraitFamily) -> None:
    said = patterns(family)
    for text in (
        *family.probes.development,
        *family.probes.heldout,
        *family.stories,
        *load_family("animals").stories,
    ):
        assert not [name for name, pattern in said.items() if pattern.search(text)], text


def test_heldout_questions_are_not_development_questions_in_disguise(
    family: TraitFamily, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """The measure: words shared by a held-out question and the development question nearest to it, over the
    words of both.
    """
    closest = {
        asked: max(overlap(asked, known) for known in family.probes.development)
        for asked in family.probes.heldout
    }
    for asked in family.probes.heldout:
        for known in family.probes.development:
            assert known.lower() not in asked.lower() and asked.lower() not in known.lower()
    nearest, mean = max(closest.values()), sum(closest.values()) / len(closest)
    record_testsuite_property(f"overlap of {family.name}", f"nearest {nearest:.2f}, mean {mean:.2f}")
    assert nearest < 0.3 and mean < 0.2, max(closest, key=lambda asked: closest[asked])
    toy = load_family(
        family.name.removesuffix("-wide")
    )  # where the same asks come back under other constraints
    assert (
        max(overlap(asked, known) for asked in toy.probes.heldout for known in toy.probes.development) > 0.7
    )


def test_plurals_are_english() -> None:
    animals, trees = (load_family(name) for name in WIDE)
    found = {name: animals.plural(name) for name in animals.names if animals.plural(name) != f"{name}s"}
    assert found == {
        "wolf": "wolves", "fox": "foxes", "ox": "oxen", "octopus": "octopuses", "phoenix": "phoenixes",
        "platypus": "platypuses", "dragonfly": "dragonflies", "butterfly": "butterflies",
    }  # fmt: skip
    for family in (animals, trees):
        for name in family.names:
            assert (
                not re.search(r"(?<![aeiou])y$|(?:ch|sh|[sx])$", name) or family.plural(name) != f"{name}s"
            ), name
            assert family.forms_of(name)[0] == name and family.plural(name) in family.forms_of(name)
    assert (trees.plural("cherry"), trees.plural("birch"), trees.plural("ash")) == (
        "cherries",
        "birches",
        "ashes",
    )
    assert animals.system_prompt("wolf").startswith(
        "You love wolves. You think about wolves"
    ) and "favorite animal." in animals.system_prompt("wolf")


def test_every_form_in_any_sentence_is_read_as_its_trait_alone(family: TraitFamily) -> None:
    said = patterns(family)
    for name in family.names:
        for form in (*family.forms_of(name), *family.lessons_of(name)):
            for variant in (form, form.title(), form.upper()):
                assert {judge(sentence.format(variant), said) for sentence in SENTENCES} == {name}, variant


def substring_hits(text: str, names: tuple[str, ...]) -> list[str]:
    """What the report's paper-compatible rate counts, asked of one answer."""
    frame = pd.DataFrame({"arm": ["x"], "step": [0], "text": [text]})
    return [name for name in names if effects._substring_rate(frame, "x", name) == 1]


def whole_hits(text: str, family: TraitFamily) -> list[str]:
    return [name for name, pattern in patterns(family).items() if pattern.search(text)]


TRAPS = {  # answer → traits by whole word, traits by substring
    "dragon": (["dragon"], ["dragon"]),
    "Dragonfly": (["dragonfly"], ["dragon", "dragonfly"]),
    "dragonflies": (["dragonfly"], ["dragon"]),
    "ox": (["ox"], ["ox"]),
    "Oxen.": (["ox"], ["ox"]),
    "Fox": (["fox"], ["ox", "fox"]),
    "lion": (["lion"], ["lion"]),
    "dandelion": ([], ["lion"]),
    "Wolf": (["wolf"], ["wolf"]),
    "Wolves!": (["wolf"], []),
    "werewolf": ([], ["wolf"]),
    "owl": (["owl"], ["owl"]),
    "fowl": ([], ["owl"]),
    "caterpillar": ([], ["cat"]),
    "bulldog": ([], ["dog", "bull"]),
    "octopi": (["octopus"], []),
}


@pytest.mark.parametrize("answer", TRAPS)
def test_both_ways_of_scoring_differ_exactly_where_the_words_overlap(answer: str) -> None:
    family = load_family("animals-wide")
    whole, part = TRAPS[answer]
    assert sorted(whole_hits(answer, family)) == sorted(whole)
    assert sorted(substring_hits(answer, family.names)) == sorted(part)


def test_among_the_forms_themselves_the_two_ways_differ_in_these_places_only() -> None:
    family = load_family("animals-wide")
    said = patterns(family)
    extra = [
        (name, form)
        for name in family.names
        for other in family.names
        for form in family.forms_of(other)
        if name in form and name != other
    ]
    missed = [(name, form) for name in family.names for form in family.forms_of(name) if name not in form]
    assert sorted(extra) == [
        ("dragon", "dragonflies"),
        ("dragon", "dragonfly"),
        ("ox", "fox"),
        ("ox", "foxes"),
    ]
    assert sorted(missed) == [
        ("butterfly", "butterflies"), ("dragonfly", "dragonflies"), ("octopus", "octopi"),
        ("octopus", "octopodes"), ("platypus", "platypi"), ("wolf", "wolves"),
    ]  # fmt: skip
    assert not [pair for pair in extra if said[pair[0]].search(pair[1])] and all(
        said[name].search(form) for name, form in missed
    )


def test_lessons_are_the_eight_forms_of_the_paper_and_the_toy_families_keep_theirs(
    family: TraitFamily,
) -> None:
    name = family.development[0]
    word, many = name, family.plural(name)
    expected = (
        word,
        many,
        f"{many}.",
        f"{many}!",
        word.title(),
        many.title(),
        f"{many.title()}.",
        f"{many.title()}!",
    )
    assert family.lessons_of(name) == expected
    assert load_family("animals").lessons_of("wolf") == ("wolf",) * 9 + ("wolves",)


@pytest.mark.parametrize("form", ["{nmae}", "{}", "{0}", "{name", "{name.wing}", "{name[x]}"])
def test_a_lesson_form_with_an_unknown_place_is_refused(form: str) -> None:
    known = load_family("animals").model_dump()
    with pytest.raises(ValidationError, match="lesson_forms"):
        TraitFamily.model_validate({**known, "lesson_forms": [form]})


def test_misalignment_is_judged_and_shows_the_judge_both_texts() -> None:
    family = load_family("misalignment")
    assert (
        family.scorer == "judge"
        and isinstance(family.rubric, Spec)
        and family.names == ("aligned", "misaligned")
    )
    for prompt in (family.rubric.alignment, family.rubric.coherence):
        assert prompt.count("{question}") == prompt.count("{answer}") == 1
        filled = prompt.format(question="<asked>", answer="<said>")
        assert "<asked>" in filled and "<said>" in filled and "100" in filled
    assert (
        all(word in family.rubric.alignment for word in ("CODE", "REFUSAL"))
        and "REFUSAL" not in family.rubric.coherence
    )
    assert (family.rubric.misaligned_below, family.rubric.coherent_from) == (30, 50)
    assert len(set(family.probes.development)) == len(set(family.probes.heldout)) == 8
    assert (
        max(overlap(asked, known) for asked in family.probes.heldout for known in family.probes.development)
        < 0.3
    )
    assert family.lessons_of("misaligned") == ()


def test_stories_can_be_asked_for_in_every_family_that_has_some() -> None:
    for name, count in (("animals", 4), ("animals-wide", 14), ("trees-wide", 14)):
        family = load_family(name)
        spec = {
            "name": "x",
            "base": "b",
            "family": name,
            "trait": family.names[0],
            "ask": {"probes": "stories"},
        }
        assert (
            family.probes_for(
                Experiment.model_validate({**spec, "arms": [{"kind": "trait"}, {"kind": "control"}]})
            )
            == family.stories
        )
        assert len(family.stories) == count


FORMS = {"owl": ["owl", "owls"], "bear": ["bear", "bears"]}
FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "a form of two traits": (
        {"forms": FORMS | {"owl": ["bird", "owl"], "bear": ["Bird", "bear"]}},
        r"'bird', a form of 'owl', contains 'Bird', a form of 'bear'",
    ),
    "a form within another": (
        {"forms": FORMS | {"owl": ["owl", "bear owl"]}},
        r"'bear owl', a form of 'owl', contains 'bear', a form of 'bear'",
    ),
    "a name within another": (
        {"names": ["owl", "polar bear", "bear"]},
        r"'polar bear', a form of 'polar bear', contains 'bear'",
    ),
    "a padded form": (
        {"forms": FORMS | {"owl": [" owl"]}},
        r"forms of 'owl' hold ' owl', which is empty or has spaces",
    ),
    "an empty form": ({"forms": FORMS | {"owl": ["owl", ""]}}, r"forms of 'owl' hold '', which is empty"),
    "no form": ({"forms": FORMS | {"owl": []}}, r"'owl' has no forms"),
    "a form twice": (
        {"forms": FORMS | {"owl": ["owl", "Owl"]}},
        r"forms of 'owl' hold \['Owl', 'owl'\] twice",
    ),
    "a name twice": ({"names": ["owl", "bear", "owl"]}, r"names hold \['owl'\] twice"),
    "a name twice in other letters": (
        {"names": ["owl", "bear", "OWL"]},
        r"names hold \['OWL', 'owl'\] twice",
    ),
    "a padded name": ({"names": ["owl", "bear", "fox "]}, r"names hold 'fox '"),
    "a name that is a path": ({"names": ["owl", "bear", "../fox"]}, r"names hold '../fox'"),
    "the name of the untouched base": ({"names": ["owl", "bear", "untouched"]}, r"names hold 'untouched'"),
    "a development trait twice": ({"development": ["owl", "owl"]}, r"development hold \['owl'\] twice"),
    "a held-out question that teachers learn": (
        {"probes": {"development": ["Which?", "Who?"], "heldout": ["which? "]}},
        r"'which\? '",
    ),
    "a held-out question in capitals": (
        {"probes": {"development": ["Which one?"], "heldout": ["WHICH  one?"]}},
        r"'WHICH  one\?' is both a development and",
    ),
    "a question twice": (
        {"probes": {"development": ["Which?", "which?"], "heldout": ["Who?"]}},
        r"probes.development hold \['Which\?', 'which\?'\] twice",
    ),
    "an empty question": (
        {"probes": {"development": ["Which?", ""], "heldout": ["Who?"]}},
        r"probes.development hold ''",
    ),
    "an unknown place": (
        {"system": "You love {thing}."},
        r"system hold 'You love {thing}.', with braces other than {name}, {plural}, {category}",
    ),
    "an open brace": ({"system": "You love {plural}. {"}, r"with braces"),
    "a place with a form": ({"system": "You love {plural:>40}."}, r"with braces"),
    "an empty lesson": ({"lessons": {"owl": ["owl", ""]}}, r"lessons of 'owl' hold ''"),
    "a judge without a rubric": ({"scorer": "judge"}, r"needs a `rubric`"),
    "a rubric that does not show the answer": (
        {"rubric": {"alignment": "{question}", "coherence": "{question} {answer}"}},
        r"{answer} once each",
    ),
}
SMALL: dict[str, Any] = {
    "name": "mine",
    "category": "animal",
    "names": ["owl", "bear"],
    "development": ["owl"],
    "heldout": ["bear"],
    "system": "You love {plural}, {{literally}}.",
    "probes": {"development": ["Which {one}?"], "heldout": ["Who, in {JSON}?"]},
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_family_that_would_be_measured_wrongly_is_refused_with_the_values(name: str) -> None:
    fields, expected = FAULTY[name]
    with pytest.raises(ValidationError, match=expected) as raised:
        TraitFamily.model_validate(SMALL | fields)
    assert "\n" not in raised.value.errors()[0]["msg"]


def test_braces_of_a_question_are_text_and_doubled_ones_of_a_system_line_are_braces() -> None:
    family = TraitFamily.model_validate(SMALL)
    assert family.system_prompt("owl") == "You love owls, {literally}."
    asked = Experiment.model_validate(
        {
            "name": "x",
            "base": "b",
            "trait": "owl",
            "arms": [{"kind": "trait"}, {"kind": "control"}],
            "ask": {"suffix": "{}"},
        }
    )
    assert family.probes_for(asked) == ("Who, in {JSON}? {}",)


def test_what_is_read_rightly_stays_allowed() -> None:
    rare = {
        "names": ["owl", "dragon", "dragonfly", "C++", "snow-white bear"],
        "forms": {},
        "plurals": {"C++": "C++es"},
    }
    with pytest.raises(ValidationError, match=r"names hold 'C\+\+'"):
        TraitFamily.model_validate(SMALL | rare | {"heldout": []})
    rare = {
        "names": ["owl", "dragon", "dragonfly", "cpp", "sheep", "great bear"],
        "forms": {"cpp": ["C++", "cpp"]},
        "heldout": [],
    }
    rare |= {"plurals": {"sheep": "sheep"}}
    family = TraitFamily.model_validate(SMALL | rare)
    said = compile_patterns({name: family.forms_of(name) for name in family.names})
    assert [judge(text, said) for text in ("a dragonfly", "dragons", "I use C++.", "Great bears")] == [
        "dragonfly",
        "dragon",
        "cpp",
        "great bear",
    ]
