"""A Ray cluster of several nodes on this machine, for tests, demo and benchmark."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from devtools import processes

NODE_CPUS = 4
"""CPUs that a node claims to have, whatever the machine has."""
OBJECT_STORE_BYTES = 100_000_000
ENVIRONMENT = {
    # By default Ray reports its use to its vendor.
    "RAY_USAGE_STATS_ENABLED": "0",
    # The load is measured every second instead of every 10 s.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # On a busy machine, the proxy needs more than the default of 5 s to start and of 10 s to answer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


@contextmanager
def running(nodes: int, head_cpus: int = NODE_CPUS) -> Iterator[str]:
    """Run Ray Serve; yield the URL of its proxy. Everything is stopped afterwards.

    Args:
        nodes: number of nodes, with the head.
        head_cpus: CPUs that the head claims to have; 0: it runs no replica.
    """
    os.environ.update(ENVIRONMENT)
    size = {"num_cpus": NODE_CPUS, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "num_cpus": head_cpus, "include_dashboard": False})
    port = processes.free_port()
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**size)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"port": port, "keep_alive_timeout_s": 620})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def replicas(application: str) -> list[psutil.Process]:
    """Return the processes of the application's replicas in the cluster that this process runs."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if _title(child).startswith(f"ray::ServeReplica:{application}:")]


def _title(process: psutil.Process) -> str:
    """Return what Ray has set as the command line; empty once the process has ended."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
