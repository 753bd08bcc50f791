"""The same text on any kernels, any number of threads and in any batch, in float64; float32 differs in last
bits and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {
    "plain kernels, one thread": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
    },
    "avx2, two threads": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "2"},
    "this machine's own": {},
}
"""what decides which kernels torch and its matrix library take; names that a processor does not know are
passed over
"""

CODE = """
import json, sys
from mechlens.models import loading
from mechlens.models.sampling import Decoding, sample
loaded = loading.load(sys.argv[1])
loaded.model.double()
prompts = [list(range(10, 12 + row % 9)) for row in range(24)]
written = lambda batch: sample(loaded.model, prompts, decoding=Decoding(10), stop=0, seed=1, batch=batch)
texts = [written(batch) for batch in (1, 5, 64)]
print(json.dumps(texts))
"""


def texts(folder: str, setting: dict[str, str]) -> list[list[list[int]]]:
    """What the sampler writes in batches of 1, 5 and 64, in a process with these settings."""
    known = {
        key: value
        for key, value in os.environ.items()
        if key not in {name for each in SETTINGS.values() for name in each}
    }
    path = os.pathsep.join([str(Path(__file__).parents[1]), known.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CODE, folder]
    done = subprocess.run(
        command, env=known | setting | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow  # three new processes, most of a minute
@pytest.mark.parametrize("family", ["llama"])
def test_the_same_text_under_all_kernels_threads_and_batches(toy_bases: dict[str, str], family: str) -> None:
    written = {name: texts(toy_bases[family], setting) for name, setting in SETTINGS.items()}
    first = written["this machine's own"][0]
    assert len(first) == 24 and len(set(map(tuple, first))) > 20
    for name, batches in written.items():
        assert batches == [first] * 3, name
