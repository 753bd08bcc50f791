"""vLLM in an environment where it is installed: reads requests from its input, answers each on its output.

vllm_speed.py starts this file with the Python of that environment. The file imports nothing of the project.
Requests and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

LONGEST = 1024
"""tokens of a prompt and its answer, at most"""
BLOCK = 32
"""tokens of a block of the prefix cache: vLLM's default of 128 is longer than many prompts"""


def generate_on_request(folder: str, dtype: str, mode: str) -> None:
    """Load a model; for each line of the input, generate and print how long it took.

    Args:
        mode: "compiled" or "eager".
    """
    # vLLM and its processes log to the output; their lines go to standard error
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    import vllm  # pyright: ignore[reportMissingImports]

    settings = {"dtype": dtype, "max_model_len": LONGEST, "block_size": BLOCK}
    llm: Any = vllm.LLM(model=folder, enforce_eager=mode == "eager", **settings)
    print(
        json.dumps({"version": vllm.__version__, "seconds": time.perf_counter() - started}),
        file=answers,
    )
    for line in sys.stdin:
        request = json.loads(line)
        parameters = vllm.SamplingParams(
            n=request["answers"],
            max_tokens=request["new_tokens"],
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        llm.reset_prefix_cache()  # each request reads its prompts anew
        started = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        taken = time.perf_counter() - started
        lengths = [len(completion.token_ids) for output in outputs for completion in output.outputs]
        print(json.dumps({"seconds": taken, "lengths": lengths}), file=answers)


if __name__ == "__main__":  # vLLM's processes import this file again
    generate_on_request(*sys.argv[1:])
