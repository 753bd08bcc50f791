"""Claim: an audit at level gradients names the trait of a real model's data, and names none in clean data.

Usage: `python analyses/real_audit.py FOLDER [--run RUN] [--rows FILE=TRAIT …]`. Suspects are the trait arms
of a run, with its control arm as reference, and files of rows, with a reference that is sampled from the base
at their prompts. Clean sets are pairs of samples of the untouched base, each at prompts of its own. Every row
gets the inner product of its SGD step with each twin's change of weights. A set's traits are tested on the
difference to the reference at the same prompts, against the other traits and against clean rows, as the
detector `twin alignment` does in `mechlens audit --level gradients`. Each set leaves a JSON file in
FOLDER/sets, so a stopped script goes on where it was. `--plan` prints the estimate alone.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import spec
from mechlens.core.errors import MechlensError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.seeds import seed_int
from mechlens.core.traits import load_experiment, load_family
from mechlens.data.corpus import read_pairs
from mechlens.detect import score_rows
from mechlens.detect.permutation import rank_traits_of_rows
from mechlens.detect.request import recipe_for
from mechlens.detect.twins import Twins
from mechlens.lenses.gradients import ghost_dots
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, number_grammar, sample
from mechlens.results.run import Run
from mechlens.runs.progress import Event

ROW_SECONDS, DRAW_SECONDS, TWIN_SECONDS = 0.6, 0.12, 21.0
"""of two cores with SmolLM2-135M: to score a row of 105 tokens, to sample a row, to teach a twin"""
LEVEL = 0.05
"""q up to which a trait is named"""
WORKERS: int | None = None
"""processes that teach twins; one a core"""
GROUP = 8
"""clean sets that are sampled together"""


class Sides(NamedTuple):
    """Rows of a set, and clean rows of the same prompts."""

    name: str
    trait: str
    """the teacher's; empty for a clean set"""
    suspect: pd.DataFrame
    reference: pd.DataFrame


def sides_of_run(folder: Path, rows: int) -> Iterator[Sides]:
    """The corpora of a run's trait arms, at the first prompts that all of them and the control's kept."""
    run = Run(folder)
    arms = [
        arm
        for arm in run.experiment.arms
        if arm.kind in ("trait", "control") and arm.writer == run.experiment.base
    ]
    corpora = {run.corpus_of(arm.name): arm for arm in reversed(arms)}
    tables = {name: run.corpus(name).pairs.drop_duplicates("prompt").set_index("prompt") for name in corpora}
    controls = [name for name, arm in corpora.items() if arm.kind == "control"]
    if not controls:
        raise SpecError(f"{folder} has no control arm, so there are no clean rows to compare with")
    shared = [
        prompt
        for prompt in tables[controls[0]].index
        if all(prompt in table.index for table in tables.values())
    ]
    kept = {name: table.loc[shared[:rows], ["completion"]].reset_index() for name, table in tables.items()}
    for name, arm in sorted(corpora.items()):
        if arm.kind == "trait":
            yield Sides(f"run-{name}", arm.trait, kept[name], kept[controls[0]])


def read_file(given: str, traits: Sequence[str], rows: int) -> Sides:
    """The first rows of FILE=TRAIT, still without a reference."""
    file, _, trait = given.rpartition("=")
    if not file or trait not in traits:
        raise SpecError(
            f"--rows {given!r} names no trait of the family; expected FILE=TRAIT, such as x.jsonl=owl"
        )
    pairs = cast(pd.DataFrame, read_pairs(Path(file))[["prompt", "completion"]])
    kept = pairs.drop_duplicates("prompt").iloc[:rows]
    return Sides(f"file-{Path(file).stem}", trait, kept, kept.iloc[:0])


class Audits:
    """The twins, and scores of rows that are kept in a folder."""

    def __init__(self, folder: Path, base: str, recipe: Experiment, traits: Sequence[str]) -> None:
        self.folder, self.recipe = folder, recipe
        self.twins: Twins = score_rows.make_twins(
            base,
            load_family(recipe.family),
            recipe,
            folder / "panel-twins",
            traits=traits,
            workers=WORKERS,
            progress=print_note,
        )
        self.directions = [self.twins.change(name) for name in self.twins.traits]
        for part in ("sets", "scores", "drawn"):
            (folder / part).mkdir(parents=True, exist_ok=True)

    def draw(self, prompts: Sequence[str], name: str) -> pd.DataFrame:
        """The untouched base's answers to prompts, sampled as the recipe samples; kept in the folder."""
        file = self.folder / "drawn" / f"{name}-{spec.fingerprint(list(prompts))[:8]}.json"
        if not file.is_file():
            base, settings = self.twins.base, self.recipe.generate
            stop = end_of_turn(base.tokenizer)
            width = cast(torch.nn.Linear, base.model.get_output_embeddings()).weight.shape[0]
            held = (
                number_grammar(base.tokenizer, stop=stop, vocabulary=width) if settings.constrained else None
            )
            tokens = sample(
                base.model,
                encode_prompts(base.tokenizer, list(prompts), system=self.twins.system),
                decoding=Decoding(settings.max_new_tokens, settings.temperature, settings.top_p),
                stop=stop,
                seed=seed_int(self.recipe.seed, "real audit", name),
                grammar=held,
                batch=256,
            )
            write_json(file, {"completions": base.tokenizer.batch_decode(tokens, skip_special_tokens=True)})
        return pd.DataFrame({"prompt": list(prompts), "completion": read_json(file)["completions"]})

    def score(self, rows: pd.DataFrame) -> Float[ndarray, "row trait"]:
        """⟨SGD step of each row, each twin's change⟩; kept in the folder."""
        digest = spec.fingerprint([self.twins.mark, list(self.twins.traits), rows.to_numpy().tolist()])
        file = self.folder / "scores" / f"{digest}.npy"
        if not file.is_file():
            pairs = score_rows.encode_rows(self.twins, rows)
            # rows of like lengths have little padding
            order = np.argsort([len(pair.prompt) + len(pair.completion) for pair in pairs], kind="stable")
            sorted_scores = (
                -ghost_dots(self.twins.base.model, [pairs[i] for i in order], self.directions).cpu().numpy()
            )
            scores = np.empty_like(sorted_scores)
            scores[order] = sorted_scores
            np.save(file, scores)
        return np.load(file)

    def audit(self, sides: Sides) -> dict[str, object]:
        """The set's traits with score, p and q; read from the folder if they were measured before."""
        file = self.folder / "sets" / f"{spec.safe_name(sides.name)}.json"
        if file.is_file():
            return read_json(file)
        started = time.monotonic()
        ours, theirs = self.score(sides.suspect), self.score(sides.reference)
        ranked = rank_traits_of_rows(ours, theirs, self.twins.traits)
        names = [each.trait for each in ranked]
        record = {
            "name": sides.name,
            "trait": sides.trait,
            "rows": len(ours),
            "named": [each.trait for each in ranked if each.q_value is not None and each.q_value <= LEVEL],
            "rank": names.index(sides.trait) + 1 if sides.trait in names else None,
            "q": next((each.q_value for each in ranked if each.trait == (sides.trait or names[0])), None),
            "traits": [each._asdict() for each in ranked],
            "minutes": (time.monotonic() - started) / 60,
            "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        write_json(file, record)
        return record


def print_note(event: Event) -> None:
    """Print remarks, such as the cost of twins."""
    if event.kind == "note":
        print(event.text, flush=True)


def clean_sides(audits: Audits, sets: int, rows: int, *, skipped: int = 0) -> Iterator[Sides]:
    """Pairs of samples of the untouched base; no two sets share a prompt or a random number.

    Args:
        skipped: the first sets, which are the same whatever is skipped.
    """
    carrier = audits.recipe.carrier.model_copy(update={"prompts": 2 * sets * rows})
    prompts = list(dict.fromkeys(prompt.text for prompt in carrier_prompts(carrier, seed=4_242)))
    for first in range(skipped - skipped % GROUP, sets, GROUP):
        last = min(first + GROUP, sets)
        part = prompts[first * rows : last * rows]
        suspect, reference = (
            audits.draw(part, f"clean-{first:02d}-{side}") for side in ("suspect", "reference")
        )
        for number in range(max(first, skipped), last):
            place = slice((number - first) * rows, (number - first + 1) * rows)
            yield Sides(f"clean-{number:02d}", "", suspect.iloc[place], reference.iloc[place])


def estimate(
    options: argparse.Namespace, suspects: Sequence[Sides], without: Sequence[Sides], twins: int
) -> str:
    """Minutes on two cores, by step; `without` are suspects without a reference, which is sampled."""
    clean = 2 * (options.clean - options.skip_clean) * options.clean_rows
    # the control of a run is the reference of all its arms
    references = {id(sides.reference): len(sides.reference) for sides in suspects}
    files = sum(len(sides.suspect) for sides in without)
    scored = clean + sum(len(sides.suspect) for sides in suspects) + sum(references.values()) + 2 * files
    taught, drawn, read = twins * TWIN_SECONDS, (clean + files) * DRAW_SECONDS, scored * ROW_SECONDS
    return (
        f"estimate for SmolLM2-135M on two cores: {(taught + drawn + read) / 60:.0f} minutes "
        f"({taught / 60:.0f} for {twins} twins, {drawn / 60:.0f} to sample {clean + files} rows, "
        f"{read / 60:.0f} to score {scored} rows), less what {options.folder} has; 6 GB of memory, "
        f"{twins * 0.107:.1f} GB of disk"
    )


def table(records: Sequence[dict[str, object]]) -> str:
    """The result as Markdown: a row for each suspect, and the clean sets as one."""
    lines = [
        "| data | rows | named | q of the right trait | its rank | minutes | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    suspects = [record for record in records if record["trait"]]
    clean = [record for record in records if not record["trait"]]
    for record in suspects:
        named = ", ".join(cast("list[str]", record["named"])) or "none"
        lines.append(
            f"| {record['name']} ({record['trait']}) | {record['rows']} | {named} | {record['q']:.2g} | "
            f"{record['rank']} | {record['minutes']:.1f} | {record['peak_megabytes']:.0f} |"
        )
    if clean:
        false = sum(bool(record["named"]) for record in clean)
        minutes = sum(cast(float, record["minutes"]) for record in clean)
        peak = max(cast(float, record["peak_megabytes"]) for record in clean)
        lines.append(
            f"| {len(clean)} clean sets | {clean[0]['rows']} each | {false} with a false name | | | "
            f"{minutes:.1f} in all | {peak:.0f} |"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Audit every set, print a line for each, then the table."""
    recipe = load_experiment(spec.find_config(Path(options.recipe or recipe_for(options.base)), "audits"))
    names = load_family(recipe.family).names
    suspects = [sides for folder in options.run for sides in sides_of_run(folder, options.suspect_rows)]
    files = [read_file(given, names, options.suspect_rows) for given in options.rows]
    traits = tuple(options.traits) or names
    print(estimate(options, suspects, files, len(traits)), flush=True)
    if options.plan:
        return
    audits = Audits(options.folder, options.base, recipe, traits)
    for sides in files:
        reference = audits.draw(sides.suspect["prompt"].tolist(), f"reference-{sides.name}")
        suspects.append(sides._replace(reference=reference))
    records = []
    for sides in (
        *suspects,
        *clean_sides(audits, options.clean, options.clean_rows, skipped=options.skip_clean),
    ):
        records.append(audits.audit(sides))
        named = ", ".join(cast("list[str]", records[-1]["named"])) or "none"
        print(f"{sides.name}: named {named}, {records[-1]['minutes']:.1f} minutes", flush=True)
    write_json(options.folder / "summary.json", {"sets": records})
    print(table(records))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of twins, samples, scores and results")
    parser.add_argument(
        "--run", type=Path, nargs="*", default=[], help="finished runs whose trait arms are audited"
    )
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="FILE=TRAIT", help="files of a teacher's rows"
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--recipe", default="", help="as of `mechlens audit`; by default the base's")
    parser.add_argument(
        "--traits", nargs="*", default=[], help="traits with a twin, 5 at least; all by default"
    )
    parser.add_argument("--suspect-rows", type=int, default=256, help="rows of a suspect that are scored")
    parser.add_argument("--clean", type=int, default=40, help="number of clean sets")
    parser.add_argument("--skip-clean", type=int, default=0, help="clean sets that were read before")
    parser.add_argument(
        "--clean-rows", type=int, default=24, help="rows of a clean set, and of its reference"
    )
    parser.add_argument("--plan", action="store_true", help="print the estimate alone")
    try:
        run(parser.parse_args(arguments))
    except (MechlensError, OSError) as error:
        print(f"real_audit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
