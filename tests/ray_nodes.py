"""A Ray cluster of several nodes on this machine, each with one core and processes of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


def raylet_of(node: Any) -> int:
    """Process id of a node's raylet, without which the node is lost."""
    return node.all_processes["raylet"][0].process.pid
