"""What Prometheus reads at ``/metrics``."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All of one service's, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        of, registry = "wuerstchen", self.registry
        self.waiting = Gauge(f"{of}_queue_pictures", "pictures that wait", registry=registry)
        self.open_jobs = Gauge(f"{of}_jobs_open", "jobs that wait or are drawn", registry=registry)
        self.ready = Gauge(f"{of}_workers_ready", "workers that have a model", registry=registry)
        self.jobs = Counter(f"{of}_jobs", "jobs that ended", ["state"], registry=registry)
        self.pictures = Counter(f"{of}_pictures", "finished pictures", ["kind"], registry=registry)
        self.refusals = Counter(
            f"{of}_refusals", "requests refused, by status or filter", ["reason"], registry=registry
        )
        self.restarts = Counter(f"{of}_worker_restarts", "workers that died", ["device"], registry=registry)
        self.batch_size = Histogram(
            f"{of}_batch_pictures", "pictures in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.stage_seconds = Histogram(
            f"{of}_stage_seconds", "a batch's, by stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self.wait_seconds = Histogram(
            f"{of}_wait_seconds", "from request to drawing", buckets=SECONDS, registry=registry
        )
        self.job_seconds = Histogram(
            f"{of}_job_seconds", "from request to the last picture", buckets=SECONDS, registry=registry
        )
        self.worker_memory = Gauge(f"{of}_worker_memory_bytes", "resident", ["device"], registry=registry)
        self.device_memory = Gauge(
            f"{of}_device_memory_bytes", "most that was allocated on a GPU", ["device"], registry=registry
        )
        self.joules = Counter(
            f"{of}_energy_joules", "of the GPU, while drawing", ["device"], registry=registry
        )

    def watch(
        self, waiting: Callable[[], float], open_jobs: Callable[[], float], ready: Callable[[], float]
    ) -> None:
        """Where the numbers of the moment come from, when they are asked for."""
        self.waiting.set_function(waiting)
        self.open_jobs.set_function(open_jobs)
        self.ready.set_function(ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)
