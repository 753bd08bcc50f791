"""Every detector's scores of every suspect of a bench, row by row.

Scores that need models are computed once and kept on disk.
"""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens.benchmark.plan import Suspect, is_whole
from mechlens.benchmark.suspects import Maker
from mechlens.core.errors import DataError
from mechlens.core.files import read_json, write_json
from mechlens.core.spec import fingerprint
from mechlens.detect.registry import Detector, RowDetector, SuspectRows, score_with
from mechlens.detect.score_rows import MOST_RATIO, encode_rows, explain_unreadable
from mechlens.detect.twins import ModelDetector, PairedScores, Twins
from mechlens.models import loading
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.runs import store
from mechlens.runs.progress import Event, Progress, silent

ROWS, SLOW_ROWS = 1000, 256
"""rows of a suspect that are scored, and by a detector that needs many passes"""
SLOW = ("prompts", "twins", "alignment", "twin alignment", "vector")
"""detectors that need many passes"""
REFERENCE, SCORES = "reference", "scores.npz"
UNREADABLE = "unreadable"
"""folder of the reasons why an audit would read no trait from a suspect; file name.json"""
DETECTOR_REFERENCE = "detector-reference"
"""clean rows that a user's detector may read: another draw than the rows of `REFERENCE` that it scores"""
VERSION = 1
"""raised when a change of a detector's code changes its scores"""
AnyDetector = RowDetector | ModelDetector | Detector


def rows_for(detector: str, suspect: Suspect) -> int:
    """Number of rows that a detector scores: fewer if it needs many passes.

    Detectors that use twins score all rows of whole trait data.
    """
    many = detector not in SLOW or (is_whole(suspect) and detector.startswith("twin"))
    return ROWS if many else SLOW_ROWS


class Scorer:
    """Scores the suspects of a bench by any detector, and keeps scores that need models in `out`."""

    def __init__(self, maker: Maker, twins: Twins | None, out: Path) -> None:
        """`twins` may be None if no detector reads rows through models."""
        self.maker, self.out, self._twins = maker, out, twins
        self.traits: tuple[str, ...] = maker.family.names
        self._user_scores: dict[tuple[str, str], Float[ndarray, "row column"]] = {}

    @property
    def reads_models(self) -> bool:
        """Whether there are twins, without which no set can be called outside."""
        return self._twins is not None

    @property
    def twins(self) -> Twins:
        """The base and its twins."""
        assert self._twins is not None, "only a detector that reads through models takes the twins"
        return self._twins

    def score(self, detector: AnyDetector, suspect: Suspect) -> PairedScores:
        """One detector's scores of a suspect's rows and of the clean rows of the same prompts."""
        if isinstance(detector, ModelDetector):
            return self._through_models(detector, suspect)
        rows = rows_for(detector.name, suspect)
        frames = (self.maker.suspect(suspect).iloc[:rows], self.maker.clean(REFERENCE).iloc[:rows])
        if isinstance(detector, RowDetector):
            ours, theirs = (detector.features(frame["completion"].tolist()).toarray() for frame in frames)
            return PairedScores(ours, theirs)
        names = (suspect.name, REFERENCE)
        ours, theirs = (self._by_user(detector, *each) for each in zip(names, frames, strict=True))
        return PairedScores(ours, theirs)

    def names_traits(self, detector: AnyDetector, suspect: Suspect) -> bool:
        """Whether a detector gives a score for each trait; a user's is judged by its scores of a suspect."""
        if isinstance(detector, RowDetector | ModelDetector):
            return isinstance(detector, ModelDetector) and detector.of_traits
        return self.score(detector, suspect).ours.shape[1] == len(self.traits) > 1

    def explain_unreadable(self, suspect: Suspect) -> str:
        """Why an audit would read no trait from the suspect's rows; empty if it would, or without twins."""
        if self._twins is None:
            return ""
        inputs = [*self._models_mark, MOST_RATIO, SLOW_ROWS, self.maker.digest(suspect, REFERENCE)]

        def fill(part: Path) -> None:
            rows = encode_rows(self.twins, self.maker.suspect(suspect).iloc[:SLOW_ROWS])
            write_json(part / f"{UNREADABLE}.json", {"why": explain_unreadable(self.twins, rows, [])})

        folder = store.make_once(self.out / UNREADABLE / suspect.name, fingerprint(inputs), fill)
        return str(read_json(folder / f"{UNREADABLE}.json")["why"])

    def measure_seconds(self, detector: AnyDetector, suspect: Suspect) -> float:
        """Processor time to score `SLOW_ROWS` rows and as many clean ones on this machine."""
        frames = [
            frame.iloc[:SLOW_ROWS] for frame in (self.maker.suspect(suspect), self.maker.clean(REFERENCE))
        ]
        started = time.process_time()
        if isinstance(detector, ModelDetector):
            detector.read(self.twins, *(encode_rows(self.twins, frame) for frame in frames))
        else:
            for frame in frames:
                if isinstance(detector, RowDetector):
                    detector.features(frame["completion"].tolist())
                else:
                    score_with(detector, self._suspect_rows(frame))
        return time.process_time() - started

    def score_all(
        self,
        detectors: Sequence[ModelDetector],
        suspects: Sequence[Suspect],
        progress: Progress | None = None,
    ) -> None:
        """Compute the missing scores that need models, detector by detector."""
        report, pairs = progress or silent, [(each, suspect) for each in detectors for suspect in suspects]
        todo = [pair for pair in pairs if not store.is_complete(*self.place_of(*pair))]
        report(Event("begin", "scores of suspects", len(pairs) - len(todo), len(pairs)))
        for detector, suspect in todo:
            self._through_models(detector, suspect)
            report(Event("end", f"{detector.name}/{suspect.name}"))

    # ── a user's detector: scores are kept only in memory, since its code may change ──

    def _by_user(self, detector: Detector, name: str, frame: pd.DataFrame) -> Float[ndarray, "row column"]:
        key = (detector.name, name)
        if key not in self._user_scores:
            self._user_scores[key] = score_with(detector, self._suspect_rows(frame))
        return self._user_scores[key]

    def _suspect_rows(self, frame: pd.DataFrame) -> SuspectRows:
        return SuspectRows(
            frame["prompt"].tolist(),
            frame["completion"].tolist(),
            self.traits,
            self.maker.experiment.base,
            load_base=lambda: self._base,
            load_reference=lambda: self._detector_reference.iloc[: len(frame)].copy(),
        )

    @cached_property
    def _base(self) -> Loaded:
        return loading.load(self.maker.experiment.base) if self._twins is None else self._twins.base

    @cached_property
    def _detector_reference(self) -> pd.DataFrame:
        return self.maker.clean(DETECTOR_REFERENCE).loc[:, ["prompt", "completion"]]

    # ── through models ──

    def _through_models(self, detector: ModelDetector, suspect: Suspect) -> PairedScores:
        folder, mark = self.place_of(detector, suspect)

        def fill(part: Path) -> None:
            rows = rows_for(detector.name, suspect)
            ours, theirs = (
                encode_rows(self.twins, frame.iloc[:rows])
                for frame in (self.maker.suspect(suspect), self.maker.clean(REFERENCE))
            )
            if detector.scores_rows_independently:
                scores = PairedScores(
                    detector.read(self.twins, ours, []).ours, self._score_clean(detector, theirs)
                )
            else:
                scores = detector.read(self.twins, ours, theirs)
            np.savez(part / SCORES, ours=scores.ours, theirs=scores.theirs)

        ours, theirs = read_scores(store.make_once(folder, mark, fill) / SCORES, "ours", "theirs")
        return PairedScores(ours, theirs)

    def place_of(self, detector: ModelDetector, suspect: Suspect) -> tuple[Path, str]:
        """The folder of a detector's scores of a suspect, and the fingerprint of their inputs.

        Inputs are rows, clean rows, base, twins and probes.
        """
        inputs = [
            detector.name,
            *self._models_mark,
            rows_for(detector.name, suspect),
            self.maker.digest(suspect, REFERENCE),
        ]
        return self.out / detector.name / suspect.name, fingerprint(inputs)

    @property
    def _models_mark(self) -> list[Any]:
        twins = self.twins
        return [VERSION, twins.mark, twins.family.fingerprint(), twins.traits, twins.system, twins.seed]

    def _score_clean(self, detector: ModelDetector, pairs: Sequence[Encoded]) -> Float[ndarray, "row column"]:
        """A detector's scores of the clean rows, which all suspects share."""
        tokens = [[*pair.prompt, *pair.completion] for pair in pairs]
        folder = store.make_once(
            self.out / REFERENCE / f"{detector.name}-{len(pairs)}",
            fingerprint([detector.name, *self._models_mark, tokens]),
            lambda part: np.savez(part / SCORES, scores=detector.read(self.twins, pairs, []).ours),
        )
        return read_scores(folder / SCORES, "scores")[0]


def read_scores(file: Path, *names: str) -> list[ndarray]:
    """The arrays of those names.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        with file.open("rb") as handle, np.load(handle) as stored:
            return [stored[name] for name in names]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"the scores in {file} cannot be read ({error}); delete {file.parent} and run again, which "
            "scores that suspect anew"
        ) from error
