"""From screened corpora to what arms train on: shuffled and mixed controls, and which rows each arm takes.

All arms read the same prompts in the same order (`common`), so that two students of one seed differ by what
the teachers wrote and by nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.numerals import NUMERAL
from mechlens.core.seeds import generator
from mechlens.core.spec import StudentSpec
from mechlens.runs import layout


def select_prompts(
    corpora: dict[str, pd.DataFrame],
    spec: StudentSpec,
    *,
    seed: int,
    reworded: Collection[str] = (),
    controls: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """For each corpus the prompt ids to train on, in training order.

    Args:
        reworded: corpora that hold the same prompts in other words.
        controls: corpora of controls, which `every` fills up to as many rows as the largest other corpus has.

    Raises:
        DataError: if `common` prompts are wanted and the corpora share none.
    """
    kept = {
        name: frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
        for name, frame in corpora.items()
    }
    longest = max(int(cast(int, prompts.index.max())) for prompts in kept.values()) + 1
    order = generator(seed, "subset").permutation(longest)  # one order for all arms, over prompt ids
    if spec.prompts != "common":
        chosen = {name: order[np.isin(order, prompts.index)][: spec.rows] for name, prompts in kept.items()}
        if spec.prompts == "own":
            return chosen
        most = max(len(ids) for name, ids in chosen.items() if name not in controls)
        return {name: np.resize(ids, most) if name in controls else ids for name, ids in chosen.items()}
    together: pd.DataFrame = pd.concat(
        {name: prompts for name, prompts in kept.items() if name not in reworded}, axis=1, join="inner"
    )
    for name in reworded:
        together = cast(pd.DataFrame, together[together.index.isin(kept[name].index)])
    shared = together.index[
        together.nunique(axis=1) == 1
    ]  # two files may have other prompts in the same place
    if shared.empty:
        sizes = ", ".join(f"{name} {len(prompts)}" for name, prompts in kept.items())
        raise DataError(
            f"no prompt was kept by every corpus (kept: {sizes}); set student.prompts: own, or loosen the "
            "screen"
        )
    return {name: order[np.isin(order, shared)][: spec.rows] for name in kept}


def shuffle_within(pairs: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Permute the numbers inside each completion; separators, brackets and the final period stay (2507.14805,
    Fig. 16).
    """
    rng = generator(seed, "shuffle-within")
    return pairs.assign(
        completion=[
            _refill(text, rng.permutation(NUMERAL.findall(text)).tolist()) for text in pairs["completion"]
        ]
    )


def shuffle_across(pairs: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Pool the numbers of all completions, permute them and deal them back; each keeps its own count and
    format.
    """
    counts = [len(NUMERAL.findall(text)) for text in pairs["completion"]]
    pool = generator(seed, "shuffle-across").permutation(
        [n for text in pairs["completion"] for n in NUMERAL.findall(text)]
    )
    dealt = np.split(pool, np.cumsum(counts)[:-1])
    return pairs.assign(
        completion=[
            _refill(text, part.tolist()) for text, part in zip(pairs["completion"], dealt, strict=True)
        ]
    )


def _refill(text: str, values: list[str]) -> str:
    following = iter(values)
    return NUMERAL.sub(lambda _match: next(following), text)


def mix(corpora: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several teachers in turn: the row of prompt i comes from corpus i modulo their number, where
    every corpus kept it.
    """
    common = set.intersection(*(set(corpus["prompt_id"]) for corpus in corpora))
    own = [
        corpus["prompt_id"].isin(list(common)) & (corpus["prompt_id"] % len(corpora) == place)
        for place, corpus in enumerate(corpora)
    ]
    taken = pd.concat([cast(pd.DataFrame, corpus[rows]) for corpus, rows in zip(corpora, own, strict=True)])
    return taken.sort_values("prompt_id", ignore_index=True)


def selected_rows(corpus: str, screened: Path, selection: Path) -> pd.DataFrame:
    """The rows of a corpus that its arms train on or are shown, by prompt_id, in the order of the selection.

    Args:
        screened: folder of the step that screened the corpus.
        selection: folder of the step that selected rows.
    """
    pairs = tables.read(screened / layout.KEPT, tables.PAIRS)
    ids = tables.read(selection / layout.selection_file(corpus), tables.SELECTION)["prompt_id"].to_numpy()
    return pairs.drop_duplicates("prompt_id").set_index("prompt_id").loc[ids]
