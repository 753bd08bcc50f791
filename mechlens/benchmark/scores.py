"""Every detector's scores of every suspect of a bench, row by row, each computed once and kept; what is made
of them is `card.py`'s.
"""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich.progress import track

from mechlens.benchmark.plan import Suspect
from mechlens.benchmark.suspects import Maker
from mechlens.core.errors import DataError
from mechlens.core.spec import fingerprint
from mechlens.detect import from_base, from_gradients, from_rows
from mechlens.detect.bags import Detector
from mechlens.detect.twins import Panel, Reader
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.runs import store

ROWS, DEAR_ROWS = 1000, 256
"""rows of a suspect that are scored, and by a reader that needs many passes"""
DEAR = ("prompts", "twins", "alignment", "twin alignment", "vector")
READERS: dict[str, Reader | Detector] = {**from_rows.DETECTORS, **from_base.READERS, **from_gradients.READERS}
REFERENCE, SCORES = "reference", "scores.npz"
VERSION = 1
"""raised when a change of a reader's code changes what it scores"""


class Scored(NamedTuple):
    """A suspect's rows and clean rows of the same prompts, as one detector scores them."""

    ours: Float[ndarray, "row column"]
    theirs: Float[ndarray, "row column"]


def rows_for(reader: str, suspect: Suspect) -> int:
    """Rows that are scored: dear readers read fewer, the two of twins a thousand of the whole data of
    fine-tuned teachers.
    """
    whole = suspect.kind == "trait" and suspect.dose == 1 and suspect.way in ("gentle", "strong")
    return ROWS if reader not in DEAR or (whole and reader.startswith("twin")) else DEAR_ROWS


def pairs_of(panel: Panel, frame: pd.DataFrame, rows: int) -> list[Encoded]:
    """The first rows in token ids."""
    head = frame.iloc[:rows]
    return encode_pairs(
        panel.base.tokenizer, head["prompt"].tolist(), head["completion"].tolist(), system=panel.system
    )


def scored(reader: Reader | Detector, panel: Panel, maker: Maker, suspect: Suspect, out: Path) -> Scored:
    """One detector on one suspect, read from `out` if it was scored before."""
    if isinstance(reader, Detector):
        frames, rows = (maker.suspect(suspect), maker.clean(REFERENCE)), rows_for(reader.name, suspect)
        return Scored(*(reader.features(frame["completion"].tolist()[:rows]).toarray() for frame in frames))
    folder, mark = place_of(reader, panel, maker, suspect, out)

    def score(part: Path) -> None:
        rows = rows_for(reader.name, suspect)
        ours, theirs = (
            pairs_of(panel, frame, rows) for frame in (maker.suspect(suspect), maker.clean(REFERENCE))
        )
        if reader.alone:
            found = Scored(reader.read(panel, ours, [])[0], _clean(reader, panel, theirs, out))
        else:
            found = Scored(*reader.read(panel, ours, theirs))
        np.savez(part / SCORES, ours=found.ours, theirs=found.theirs)

    return Scored(*_load(store.make_once(folder, mark, score) / SCORES, "ours", "theirs"))


def place_of(reader: Reader, panel: Panel, maker: Maker, suspect: Suspect, out: Path) -> tuple[Path, str]:
    """The folder of a reader's scores of a suspect, and the fingerprint of all that decides them: rows, clean
    rows, base, twins and probes.
    """
    decides = [
        reader.name,
        *_decides(panel),
        rows_for(reader.name, suspect),
        maker.digest(suspect, REFERENCE),
    ]
    return out / reader.name / suspect.name, fingerprint(decides)


def _decides(panel: Panel) -> list[Any]:
    return [VERSION, panel.mark, panel.family.fingerprint(), panel.traits, panel.system, panel.seed]


def _load(file: Path, *names: str) -> list[ndarray]:
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


def seconds(reader: Reader | Detector, panel: Panel, maker: Maker, suspect: Suspect) -> float:
    """Processor time that it takes here to score `DEAR_ROWS` rows and as many clean ones."""
    frames = [frame.iloc[:DEAR_ROWS] for frame in (maker.suspect(suspect), maker.clean(REFERENCE))]
    begun = time.process_time()
    if isinstance(reader, Detector):
        for frame in frames:
            reader.features(frame["completion"].tolist())
    else:
        reader.read(panel, *(pairs_of(panel, frame, DEAR_ROWS) for frame in frames))
    return time.process_time() - begun


def _clean(reader: Reader, panel: Panel, pairs: Sequence[Encoded], out: Path) -> Float[ndarray, "row column"]:
    """A reader's scores of the clean rows alone, which all suspects share."""
    mark = fingerprint([reader.name, *_decides(panel), [[*one.prompt, *one.completion] for one in pairs]])
    folder = store.make_once(
        out / REFERENCE / f"{reader.name}-{len(pairs)}",
        mark,
        lambda part: np.savez(part / SCORES, scores=reader.read(panel, pairs, [])[0]),
    )
    return _load(folder / SCORES, "scores")[0]


def score_all(
    readers: Sequence[Reader], panel: Panel, maker: Maker, suspects: Sequence[Suspect], out: Path
) -> None:
    """Score what is not scored yet, detector by detector."""
    pairs = [(reader, suspect) for reader in readers for suspect in suspects]
    todo = [pair for pair in pairs if not store.is_complete(*place_of(pair[0], panel, maker, pair[1], out))]
    for reader, suspect in track(todo, description="scoring"):
        scored(reader, panel, maker, suspect, out)
