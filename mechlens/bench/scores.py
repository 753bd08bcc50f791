"""Every detector's scores of every suspect of a bench, row by row, each computed once and kept; what is made of them is `card.py`'s."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich.progress import track

from mechlens.bench.plan import Suspect
from mechlens.bench.suspects import Maker
from mechlens.chat import Encoded, encode_pairs
from mechlens.detect import from_base, from_gradients, from_rows
from mechlens.detect.base import Detector
from mechlens.detect.panel import Panel, Reader
from mechlens.spec import fingerprint

ROWS, DEAR_ROWS = 1000, 256
"""rows of a suspect that are scored, and by a reader that needs many passes"""
DEAR = ("prompts", "twins", "alignment", "twin alignment", "vector")
READERS: dict[str, Reader | Detector] = {**from_rows.DETECTORS, **from_base.READERS, **from_gradients.READERS}
REFERENCE = "reference"


class Scored(NamedTuple):
    """A suspect's rows and clean rows of the same prompts, as one detector scores them."""

    ours: Float[ndarray, "row column"]
    theirs: Float[ndarray, "row column"]


def rows_for(reader: str, suspect: Suspect) -> int:
    """Rows that are scored: dear readers read fewer, the two of twins a thousand of the whole data of fine-tuned teachers."""
    whole = suspect.kind == "trait" and suspect.dose == 1 and suspect.way in ("gentle", "strong")
    return ROWS if reader not in DEAR or (whole and reader.startswith("twin")) else DEAR_ROWS


def pairs_of(panel: Panel, frame: pd.DataFrame, rows: int) -> list[Encoded]:
    """The first rows in token ids."""
    head = frame.iloc[:rows]
    return encode_pairs(panel.base.tokenizer, head["prompt"].tolist(), head["completion"].tolist(), system=panel.system)


def scored(reader: Reader | Detector, panel: Panel, maker: Maker, suspect: Suspect, out: Path) -> Scored:
    """One detector on one suspect, read from `out` if it was scored before."""
    rows, clean = rows_for(reader.name, suspect), maker.clean(REFERENCE)
    if isinstance(reader, Detector):
        sides = (reader.features(frame["completion"].tolist()[:rows]).toarray() for frame in (maker.suspect(suspect), clean))
        return Scored(*sides)
    file = file_of(reader, panel, maker, suspect, out)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        ours = pairs_of(panel, maker.suspect(suspect), rows)
        theirs = pairs_of(panel, clean, rows)
        if reader.alone:
            found = Scored(reader.read(panel, ours, [])[0], _clean(reader, panel, theirs, file.parent))
        else:
            found = Scored(*reader.read(panel, ours, theirs))
        np.savez(file.with_suffix(".part.npz"), ours=found.ours, theirs=found.theirs)
        file.with_suffix(".part.npz").replace(file)
    with np.load(file) as held:
        return Scored(held["ours"], held["theirs"])


def file_of(reader: Reader, panel: Panel, maker: Maker, suspect: Suspect, out: Path) -> Path:
    """Where a reader's scores of a suspect lie, named by what they were made of: rows, clean rows, base and twins."""
    return out / reader.name / f"{suspect.name}-{fingerprint([panel.mark, maker.digest(suspect, REFERENCE)])[:10]}.npz"


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


def _clean(reader: Reader, panel: Panel, pairs: Sequence[Encoded], folder: Path) -> Float[ndarray, "row column"]:
    file = folder / f"{REFERENCE}-{fingerprint([panel.mark, [[*one.prompt, *one.completion] for one in pairs]])[:10]}.npz"
    if not file.is_file():
        np.savez(file, scores=reader.read(panel, pairs, [])[0])
    with np.load(file) as held:
        return held["scores"]


def score_all(readers: Sequence[Reader], panel: Panel, maker: Maker, suspects: Sequence[Suspect], out: Path) -> None:
    """Score what is not scored yet, detector by detector."""
    todo = [(reader, suspect) for reader in readers for suspect in suspects if not file_of(reader, panel, maker, suspect, out).is_file()]
    for reader, suspect in track(todo, description="scoring"):
        scored(reader, panel, maker, suspect, out)
