"""The rows of a suspect beside those of its references, and what detectors that read no model say of them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from mechlens.core import spec
from mechlens.core.errors import one_line
from mechlens.data import corpus
from mechlens.detect import from_rows
from mechlens.detect.registry import RowDetector
from mechlens.detect.request import AuditRequest
from mechlens.detect.two_samples import LEAST_ROWS, Comparison, RowKeys, compare, read_row_keys, refuse_few


def read_keys(
    request: AuditRequest, report: corpus.ReadReport, processes: Executor | None
) -> dict[Path, RowKeys]:
    """The keys of the rows of the data and of each reference; a bad file is refused before any test.

    Args:
        report: of the data.
    """
    paths = dict.fromkeys((request.data, *request.references))
    reports = {path: corpus.ReadReport(drop_system=False) for path in paths} | {request.data: report}
    keys = {
        path: read_row_keys(
            corpus.batches(path, report=reports[path], fields=request.fields_of(path)), processes
        )
        for path in paths
    }
    for path, rows in keys.items():
        if request.references or request.level != "rows":
            refuse_few(path, len(rows.prompts))
    return keys


def compare_references(
    request: AuditRequest, keys: Mapping[Path, RowKeys], processes: Executor | None
) -> tuple[list[Comparison], AuditRequest]:
    """The data against each reference, the nearest first, and the request with its references in that order.

    The nearest has the largest p. So has a small one, whatever its writer, and it leaves students with few
    rows: it comes after those of enough rows. A copy of the data is no reference and comes last.
    """
    most = request.policy.most_copied
    comparisons = [
        compare(
            request.data,
            reference,
            known=keys,
            fields=request.fields,
            workers=processes,
            detectors=row_detectors(request),
        )
        for reference in request.references
    ]
    comparisons = sorted(
        comparisons, key=lambda each: (each.copied > most, each.rows < LEAST_ROWS, -each.p_value)
    )
    by_name = {one_line(str(path)): path for path in request.references}
    nearest_first = dict.fromkeys(by_name[each.reference] for each in comparisons)
    return comparisons, request._replace(references=tuple(nearest_first))


def row_detectors(request: AuditRequest) -> dict[str, RowDetector]:
    """This package's detectors of completions, and those that were given."""
    given = request.detectors.values()
    return from_rows.DETECTORS | {detector.name: detector.as_row_detector() for detector in given}


def score_whole_file(request: AuditRequest) -> list[dict[str, Any]]:
    """What each given detector says of the file, and on what it was fitted; its bags are kept in a table."""
    return [
        {"name": one_line(detector.name), "folder": one_line(str(folder))}
        | {name: detector.record[name] for name in ("traits", "left_out")}
        | detector.score_file(
            request.data,
            bags=request.out / f"bags-{spec.folder_name(detector.name)}.parquet",
            fields=request.fields,
        )
        for folder, detector in request.detectors.items()
    ]
