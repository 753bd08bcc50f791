"""A Ray cluster of several nodes on this machine, each with one core and processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100_000_000}


@contextmanager
def running(nodes: int) -> Iterator[Any]:
    """A cluster that RAY_ADDRESS names; its nodes import modules of the tests."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster: Any = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def joined(address: str, prefix: Sequence[str]) -> Iterator[None]:
    """A node that joins a cluster, by `ray start` behind the words of a prefix."""
    command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}"]
    node = subprocess.Popen(
        [*command, "--num-cpus=1", "--block"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert node.stdout is not None
    try:
        assert any("Ray runtime started" in line for line in node.stdout)
        yield
    finally:
        node.terminate()
        node.wait()
        node.stdout.close()


def raylet_of(node: Any) -> int:
    """Process id of a node's raylet, without which the node is lost."""
    return node.all_processes["raylet"][0].process.pid
