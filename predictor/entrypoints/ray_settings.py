"""Settings of the predictor on Ray Serve. Neither Ray nor torch is imported, so that preflight checks them too."""

from pydantic import Field

from predictor.errors import InvalidSettings
from predictor.settings import Settings

_NOT_SERVED = {
    "enable_grpc": "Serve's proxy has no route for it. Use HTTP",
    "enable_admin_routes": "a request reaches any one replica. Use `serve delete`",
    "hold_while_loading": "Serve's proxy holds requests until a replica is ready. Leave it out",
    "ready_while_loading": "Serve's proxy holds requests until a replica is ready. Leave it out",
}
"""Settings without a meaning behind the proxy, and what to do instead."""


class RaySettings(Settings):
    """The predictor's settings, and Ray's options of the deployment under Ray's names."""

    num_replicas: int | None = Field(default=None, ge=1)
    """Number of replicas. Default: 1, or by load between min_replicas and max_replicas."""
    min_replicas: int = Field(default=1, ge=0)
    """Minimum number of replicas. 0: none without requests."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Maximum number of replicas, which turns autoscaling on."""
    upscale_delay_s: float = Field(default=30, ge=0)
    """Time above the target load after which replicas are added, in seconds."""
    downscale_delay_s: float = Field(default=600, ge=0)
    """Time below the target load after which replicas are removed, in seconds."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of a replica; also its number of torch threads, unless num_threads is set."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a replica. With several, set tensor_parallel_size too."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """TCP port of each replica's own metrics and probes; a node then runs one replica. Default: none."""


def check(parsed: RaySettings) -> None:
    """Check relations between settings.

    Raises:
        InvalidSettings: naming the setting, and the fix.
    """
    for name, reason in _NOT_SERVED.items():
        if getattr(parsed, name):
            raise InvalidSettings(f"{name}: not possible with Ray Serve: {reason}.")
    if parsed.num_replicas and parsed.max_replicas:
        raise InvalidSettings("num_replicas: max_replicas sets the number by load. Set one of them.")
    if "min_replicas" in parsed.model_fields_set and not parsed.max_replicas:
        raise InvalidSettings("min_replicas: without max_replicas the number does not follow the load. Set both.")
    ranks = parsed.tensor_parallel_size
    if parsed.num_gpus and ranks not in ("auto", max(1, parsed.num_gpus)):
        raise InvalidSettings(
            f"num_gpus: {parsed.num_gpus:g} GPUs, but tensor_parallel_size is {ranks}. Set both to the same number."
        )
