"""The plan of a run: operations by formula, padding by its definition, a schedule that keeps its order."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from mechlens.core.experiment import Experiment
from mechlens.core.spec import CONFIGS, Training
from mechlens.core.traits import load_experiment, load_family
from mechlens.models.loading import Size
from mechlens.pipeline import estimate
from mechlens.runs.jobs import Job, fingerprints
from mechlens.runs.plan import jobs_of

DEMO = CONFIGS / "experiments" / "demo.yaml"
SIZE = Size(parameters=1_000, layers=2, width=4, vocabulary=50)
BODY, HEAD = 800, 200


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of the machine on which the demo and SmolLM2 were timed, with two workers."""
    monkeypatch.setattr(estimate, "measure_product_rate", lambda: 1.6e11)
    monkeypatch.setattr("mechlens.core.machine.workers", lambda each=1: 2 // each)


def steps_of(experiment: Experiment, path: Path = DEMO) -> list[Job]:
    family = load_family(experiment.family, path)
    return jobs_of(experiment, family, bases=dict.fromkeys(experiment.bases(), "x"))


def test_operations_of_a_pass() -> None:
    assert estimate.forward_operations(SIZE, 10.0, 3.0) == 2 * (10 * BODY + 3 * HEAD)
    blocks, head = 2 * 10 * BODY, 2 * 3 * HEAD
    cases = (
        (Training(), 3 * blocks + 3 * head),
        (Training(embeddings=False), 3 * blocks + 2 * head),
        (Training(gradient_checkpointing=True), 4 * blocks + 3 * head),
        (Training(update="lora"), 2 * blocks + 2 * head),
    )
    for training, expected in cases:
        assert estimate.training_operations(training, SIZE, 10.0, 3.0) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_expected_longest_row_is_the_mean_over_all_batches(count: int) -> None:
    lengths = [3, 9, 4, 9]
    batches = itertools.product(lengths, repeat=count)
    assert estimate.expected_longest(lengths, count) == pytest.approx(statistics.mean(map(max, batches)))


def test_jobs_that_train_declare_the_memory_of_a_student(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment(DEMO)
    jobs, memory = steps_of(experiment), estimate.PROCESS + round(sum(estimate.memory_of(experiment)))
    declared = estimate.declare_memory(experiment, jobs)
    assert fingerprints(declared) == fingerprints(jobs)
    assert max(job.needs.memory for job in declared if job.stage == "distill") == memory
    assert any(job.needs.memory > estimate.PROCESS for job in declared if job.stage == "teach")
    assert {job.needs.memory for job in declared if job.stage not in ("teach", "distill")} == {0}
    monkeypatch.setattr("mechlens.core.machine.cards", lambda: ("0",))
    assert estimate.declare_memory(experiment, jobs) == jobs


def test_a_schedule_waits_for_inputs_and_for_workers() -> None:
    jobs = [
        Job("a", "teach", {}, {}, 1),
        Job("b", "teach", {}, {}, 1),
        Job("c", "ask", {}, {"student": "a"}, 1),
        Job("d", "ask", {}, {"student": "b"}, 1),
    ]
    seconds = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 1.0}
    assert estimate.schedule_seconds(jobs, seconds, 1) == 10
    assert estimate.schedule_seconds(jobs, seconds, 2) == 6
    assert estimate.schedule_seconds(jobs, seconds, 99) == 6
    assert estimate.schedule_seconds([], {}, 2) == 0


def test_a_narrow_model_is_slower_than_a_wide_one() -> None:
    rates = [estimate.core_rate(width, product_rate=1e11) for width in (64, 576, 4096)]
    assert rates == sorted(rates) and rates[-1] < 1e11
    assert estimate.core_rate(estimate.NARROW, product_rate=1e11) == estimate.EFFICIENCY * 1e11 / 2


@pytest.mark.usefixtures("quiet_machine")
def test_the_demo_takes_as_long_as_planned(tmp_path: Path) -> None:
    """`make demo` took 208 s with two workers on the machine of the fixture; its students took 347 s."""
    experiment = load_experiment(DEMO)
    plan = estimate.plan_of(experiment, steps_of(experiment), tmp_path)
    assert 208 / 1.5 < plan.seconds < 208 * 1.5
    students = next(work for work in plan.works if work.stage == "distill")
    assert 347 / 1.5 < students.seconds < 347 * 1.5


@pytest.mark.usefixtures("quiet_machine")
def test_a_student_of_two_processes_takes_both_cores(tmp_path: Path) -> None:
    """Its operations are the same in half the time, and a process holds half of the activations."""
    experiment = load_experiment(DEMO)
    training = experiment.student.training.model_copy(update={"processes": 2})
    shared = experiment.model_copy(
        update={"student": experiment.student.model_copy(update={"training": training})}
    )
    one, two = (estimate.plan_of(spec, steps_of(spec), tmp_path) for spec in (experiment, shared))
    assert (one.workers, two.workers) == (2, 1) and one.where == two.where == "2 cores"
    assert two.memory == (one.memory[0], one.memory[1] / 2) and two.batch == one.batch // 2
    alone, together = (next(work for work in plan.works if work.stage == "distill") for plan in (one, two))
    assert alone[:-1] == together[:-1] and alone.seconds / 2 < together.seconds < alone.seconds / 1.5


def test_the_demo_students_by_formula() -> None:
    """A student's operations lie between those of its tokens and those of rows that are all the longest."""
    experiment = load_experiment(DEMO)
    works = estimate.work_of(experiment, steps_of(experiment))
    students = next(work for work in works if work.stage == "distill")
    size = Size(196_800, 2, 64, 1526)
    rows = students.updates * 64
    least = estimate.training_operations(experiment.student.training, size, rows * 41.0, rows * 15.0)
    most = estimate.training_operations(experiment.student.training, size, rows * 57.0, rows * 57.0)
    assert least < students.operations < most


def test_soft_labels_are_planned_work() -> None:
    experiment = load_experiment(DEMO)
    soft = experiment.model_copy(update={"student": experiment.student.model_copy(update={"labels": "soft"})})
    works = {work.stage: work for work in estimate.work_of(soft, steps_of(soft))}
    assert works["label"].steps > 0
    assert works["label"].seconds > works["label"].steps * estimate.STEP


def test_every_checkpoint_that_is_asked_is_counted() -> None:
    experiment = load_experiment(DEMO)
    last = experiment.model_copy(update={"ask": experiment.ask.model_copy(update={"checkpoints": "last"})})
    every, one = (
        next(work for work in estimate.work_of(spec, steps_of(spec)) if work.stage == "ask")
        for spec in (experiment, last)
    )
    assert every.operations > 2 * one.operations
    assert every.seconds > one.seconds


def test_whole_answers_are_planned_work() -> None:
    experiment = load_experiment(DEMO)
    ask = experiment.ask.model_copy(update={"likelihood": "whole-answer"})
    whole = experiment.model_copy(update={"ask": ask})
    names = load_family(experiment.family, DEMO).names
    probes = len(load_family(experiment.family, DEMO).probes_for(experiment))
    expected = 2 * probes * sum(1 + len(name) / estimate.CHARACTERS for name in names)
    for job in steps_of(whole):
        if job.stage == "ask":
            assert estimate._whole_answer_tokens(job) == pytest.approx(expected)
    assert {estimate._whole_answer_tokens(job) for job in steps_of(experiment) if job.stage == "ask"} == {0.0}


def test_the_measurement_leaves_the_threads() -> None:
    import torch

    threads = torch.get_num_threads()
    estimate.measure_product_rate.cache_clear()
    assert estimate.measure_product_rate() > 1e8
    assert torch.get_num_threads() == threads


def test_an_arm_with_its_own_training_declares_its_own_memory() -> None:
    wide = load_experiment(DEMO).model_dump(exclude_unset=True)
    training = {"update": "full", "batch": 4096}
    wide["arms"] = [
        {"kind": kind, **more} for more in ({}, {"training": training}) for kind in ("trait", "control")
    ]
    experiment = Experiment.model_validate(wide)
    declared = estimate.declare_memory(experiment, steps_of(experiment))
    of = {job.name: job.needs.memory for job in declared if job.stage == "distill"}
    plain, large = (
        [memory for name, memory in of.items() if ("4096" in name) == is_large] for is_large in (False, True)
    )
    assert plain and large and min(large) > 2 * max(plain)
    most = estimate.PROCESS + round(sum(estimate.memory_of(experiment)))
    assert max(of.values()) == most
