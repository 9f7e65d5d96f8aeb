"""The Ray cluster of a front: one of its own on this computer, or one that exists.

A cluster of its own listens on the loopback address alone and ends with the front. In a cluster
that exists the application "musicgen" is deployed once and stays when a front ends; other fronts
take it as it is. Replicas on CPUs beside those on GPUs are an application of their own,
"musicgen-cpu".
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from musicgen_ui import files
from musicgen_ui.backends.ray_replica import Replica
from musicgen_ui.backends.ray_scaling import DELAYS
from musicgen_ui.backends.ray_serve import RayBackend
from musicgen_ui.errors import RequestError

if TYPE_CHECKING:  # torch; Ray need not be installed
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from musicgen_ui.backends.local import EngineOptions

APPLICATION = "musicgen"
CPU_APPLICATION = "musicgen-cpu"
SMALL_BYTES = 3_000_000_000  # of checkpoints for CPUs while there are GPUs: up to musicgen-small
CPU_ROWS = 4  # at most, of a replica on CPUs beside those on GPUs
OBJECT_STORE_BYTES = 200_000_000  # a chunk is 64 kB, and goes from process to process
DRAIN_S = 600.0  # that a replica has to finish its takes when another takes its place
CONTROLS = 8  # calls beside a replica's jobs: without room for them no beat comes through
STARTS = 4  # Ray gives its processes 30 s, which a busy computer may need more than once
# What Ray reads when it is imported. Its name speaks of other systems: without clusters Ray uses
# the loopback address for everything, on Linux too.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_agent_register_timeout_ms": "120000"}
# Ray's processes look ten times a second whether anything has changed, which takes a share of the
# cores from the replicas beside them; and what is larger than 100 kB takes a way that costs more.
FRUGAL = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "REPORTER_UPDATE_INTERVAL_MS": "10000",
    "RAY_max_direct_call_object_size": "1000000",  # bytes
}
NO_STATISTICS = {"RAY_USAGE_STATS_ENABLED": "0"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """Which cluster a front uses."""

    address: str = ""  # "auto" or host:port of one that exists; "" starts one
    replicas: int = 0  # 0 is one for each GPU, or one without any
    most_replicas: int = 0  # with more than `replicas`, the number goes by the music that waits
    front_only: bool = False  # the applications were deployed by another front
    cpu_replicas: int = 0  # beside those on GPUs, for small checkpoints


class Arguments(TypedDict, total=False):
    """Arguments of the application."""

    options: EngineOptions
    checkpoint: str  # loaded before a replica takes jobs
    replicas: int  # 0 is one for each GPU, or one without any
    max_replicas: int  # with more than `replicas`, the number goes by the music that waits
    most_bytes: int  # of a checkpoint that should come here while others can take it; 0 is any


def connect(cluster: Cluster, options: EngineOptions, checkpoint: str = "auto") -> RayBackend:
    """Starts or joins a cluster and deploys the replicas; waits until they take jobs.

    Args:
        cluster: which one.
        options: of each replica's `LocalBackend`.
        checkpoint: loaded before a replica takes jobs.

    Raises:
        RequestError: there is no such cluster, or its application was not deployed.
    """
    os.environ |= NO_STATISTICS
    shut_down = (
        _join(cluster.address)
        if cluster.address
        else _start(cluster.replicas + cluster.cpu_replicas)
    )
    try:
        return RayBackend(_handles(cluster, options, checkpoint), shut_down)
    except BaseException:
        shut_down()
        raise


def _start(replicas: int) -> Callable[[], None]:
    """Starts a cluster on this computer alone; returns what ends it."""
    os.environ |= LOOPBACK | {name: os.environ.get(name, value) for name, value in FRUGAL.items()}
    import ray
    from ray import serve

    ended = threading.Event()
    folder = files.private_folder(files.SHORT)  # a socket's path has 107 characters

    def shut_down() -> None:
        with contextlib.suppress(Exception):  # its processes end in any case
            serve.shutdown()
        ray.shutdown()
        ended.set()
        files.delete(folder)

    def init() -> None:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, replicas),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            configure_logging=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": _python_path()}},
            _temp_dir=str(folder),
        )

    for left in reversed(range(STARTS)):
        try:
            _call_in_lasting_thread(init, ended)
            break
        except Exception as error:  # Ray raises the bare class
            ray.shutdown()
            if not left:
                files.delete(folder)
                raise RequestError(f"The Ray cluster did not start: {error}") from error
            log.warning("The Ray cluster did not start and is tried again", exc_info=error)
    _check_loopback(shut_down)
    return shut_down


def _call_in_lasting_thread(work: Callable[[], None], ended: threading.Event) -> None:
    """Calls `work` in a thread that stays until `ended` is set, and waits for the call.

    Linux ends the processes of a cluster with the *thread* that started them, as Ray asks it to;
    the thread that builds a server's backend ends when it is built.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
            return
        done.set_result(None)
        ended.wait()

    threading.Thread(target=run, name="ray-cluster", daemon=True).start()
    done.result()


def _check_loopback(shut_down: Callable[[], None]) -> None:
    """Ends a cluster that others can reach, as where Ray was imported before `LOOPBACK` was set.

    Raises:
        RequestError: it was.
    """
    import ray

    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        shut_down()
        raise RequestError(
            f"Ray would listen on {address} instead of the loopback address: set "
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before the app is started."
        )


def _join(address: str) -> Callable[[], None]:
    """Joins a cluster that exists; returns what leaves it."""
    if _has_token():  # Ray itself shows it only to clusters that it finds on this computer
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"No Ray cluster at {address} lets this computer in: start one with “ray start "
            "--head”, give its token in RAY_AUTH_TOKEN if it has one, or leave --ray-address out "
            "for a cluster on this computer."
        ) from error
    leave: Callable[[], None] = ray.shutdown
    return leave


def _has_token() -> bool:
    """Whether this user has the token of a cluster, where Ray looks for one."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return bool(named) or (files.expanded("~") / ".ray" / "auth_token").exists()


def _handles(cluster: Cluster, options: EngineOptions, checkpoint: str) -> list[DeploymentHandle]:
    """Of the application and, where there is one, of that on CPUs; deploys them if asked to."""
    from ray import serve

    if cluster.front_only:
        found = serve.status().applications
        if APPLICATION not in found:
            raise RequestError(
                f"The cluster has no application “{APPLICATION}”: start one front without "
                "--front-only, or deploy it with “serve deploy”."
            )
        return [
            serve.get_app_handle(name) for name in (APPLICATION, CPU_APPLICATION) if name in found
        ]
    # No proxies: visitors reach the front alone.
    serve.start(proxy_location="Disabled")
    arguments: Arguments = {
        "options": options,
        "checkpoint": checkpoint,
        "replicas": cluster.replicas,
        "max_replicas": cluster.most_replicas,
    }
    handles = [serve.run(build(arguments), name=APPLICATION, route_prefix=None)]
    if cluster.cpu_replicas:
        on_cpu: EngineOptions = {
            **options,
            "device": "cpu",
            "precision": "auto",
            "budget_bytes": None,
            "max_jobs": min(CPU_ROWS, options.get("max_jobs", CPU_ROWS)),
        }
        arguments = {
            "options": on_cpu,
            "checkpoint": "bundled",  # always there: others are loaded when they are asked for
            "replicas": cluster.cpu_replicas,
            "most_bytes": SMALL_BYTES,
        }
        handles.append(serve.run(build(arguments), name=CPU_APPLICATION, route_prefix=None))
    return handles


def build(arguments: Arguments) -> Application:
    """The application, also for a Serve configuration: `import_path` of docs/scaling.md.

    Args:
        arguments: of the replicas.
    """
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    options: EngineOptions = {**arguments.get("options", {})}
    gpus = int(ray.cluster_resources().get("GPU", 0)) if options.get("device") != "cpu" else 0
    replicas = int(arguments.get("replicas", 0)) or gpus or 1
    rows = int(options.get("max_jobs", 8))
    most = int(arguments.get("max_replicas", 0))
    number: dict[str, object] = {"num_replicas": replicas}
    if most > replicas:
        policy = {"policy_function": "musicgen_ui.backends.ray_scaling:policy"}
        limits = {"min_replicas": replicas, "max_replicas": most, **DELAYS}
        number = {"autoscaling_config": {**limits, "look_back_period_s": 15.0, "policy": policy}}
    deployment = serve.deployment(
        name="Replica",
        **number,
        max_ongoing_requests=rows + CONTROLS,
        # One replica a GPU, which steps its rows together: a fraction of a GPU is only a number.
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if gpus else 0,
            "runtime_env": {"env_vars": _environment(replicas if not gpus else 1)},
        },
        request_router_config=RequestRouterConfig(
            request_router_class="musicgen_ui.backends.ray_router.OrderedRouter"
        ),
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=1,
        logging_config={"enable_access_log": False},  # a line for each beat of each front
    )
    return deployment(Replica).bind(
        options,
        arguments.get("checkpoint", "auto"),
        most_bytes=int(arguments.get("most_bytes", 0)),
    )


def _environment(replicas: int) -> dict[str, str]:
    """Of a replica: threads, or Ray gives it a single one, and where this package lies."""
    threads = max(1, (os.cpu_count() or 1) // replicas)
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONPATH": _python_path(),
    }


def _python_path() -> str:
    """Where this package lies, and what this process was given."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), given]))
