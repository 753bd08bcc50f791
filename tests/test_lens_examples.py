"""Every lens has an example of its own on values, without a run, and the example is true."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

from mechlens.lenses import lens_names


@pytest.mark.parametrize("name", lens_names())
def test_the_examples_of_a_lens_are_true(name: str) -> None:
    module = import_module(f"mechlens.lenses.{name}")
    examples = [test for test in doctest.DocTestFinder().find(module, module.__name__) if test.examples]
    assert examples, f"no function of {module.__name__} has an example (>>>) in its docstring"
    report: list[str] = []
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
