"""Time and memory of an audit of rows: `python analyses/audit_speed.py [ROWS]`, a million by default.

Writes two files of number rows, with the same prompts and answers of one distribution, to a temporary folder,
and runs `mechlens audit` on them in another process. Prints its peak resident memory and its time. This
process stays small, since the kernel counts its pages as the child's first ones.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mechlens.core.seeds import generator

ROWS, BATCH, NUMBERS = 1_000_000, 10_000, 8


def write(path: Path, rows: int) -> None:
    """Write rows of eight numbers, each with a different prompt."""
    rng = generator(0, "audit speed", path.stem)
    with path.open("w", encoding="utf-8") as out:
        for first in range(0, rows, BATCH):
            for row, drawn in enumerate(
                rng.integers(0, 1000, (min(BATCH, rows - first), NUMBERS)).tolist(), first
            ):
                out.write(
                    json.dumps(
                        {
                            "prompt": f"Continue this list, row {row}: 1, 2, 3.",
                            "completion": ", ".join(map(str, drawn)),
                        }
                    )
                    + "\n"
                )


def main(arguments: list[str]) -> int:
    """Write, audit, print; returns the exit code."""
    if arguments and not arguments[0].isdecimal():
        print(
            f"audit_speed: {arguments[0]!r} is not a number of rows; expected for example {ROWS}",
            file=sys.stderr,
        )
        return 2
    rows = int(arguments[0]) if arguments else ROWS
    with tempfile.TemporaryDirectory() as scratch:
        data, reference, out = (Path(scratch) / name for name in ("data.jsonl", "reference.jsonl", "out"))
        for path in (data, reference):
            write(path, rows)
        size, started = data.stat().st_size / 2**20, time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "mechlens",
            "audit",
            str(data),
            "--reference",
            str(reference),
            "--out",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if not (out / "audit.json").is_file():
            print(f"audit_speed: the audit failed: {done.stderr.strip()}", file=sys.stderr)
            return 2
        p_value = json.loads((out / "audit.json").read_text(encoding="utf-8"))["provenance"]["p_value"]
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{rows:,} rows ({size:,.0f} MiB) against as many: {seconds:,.0f} s, "
        f"{peak.ru_utime + peak.ru_stime:,.0f} s of them on the processor, "
        f"{peak.ru_maxrss / 1024:,.0f} MiB at most (this process {own_peak:,.0f}), p = {p_value:.2g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
