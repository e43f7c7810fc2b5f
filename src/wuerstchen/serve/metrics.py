"""Metrics for Prometheus, served at ``/metrics``."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        of, registry = "wuerstchen", self.registry
        self.waiting = Gauge(f"{of}_queue_pictures", "Images in the queue.", registry=registry)
        self.open_jobs = Gauge(f"{of}_jobs_open", "Jobs that have not ended.", registry=registry)
        self.ready = Gauge(f"{of}_workers_ready", "Workers that are ready.", registry=registry)
        self.jobs = Counter(f"{of}_jobs", "Ended jobs, by state.", ["state"], registry=registry)
        self.images = Counter(f"{of}_pictures", "Finished images, by kind.", ["kind"], registry=registry)
        self.refusals = Counter(
            f"{of}_refusals", "Refused requests, by status code or filter.", ["reason"], registry=registry
        )
        self.restarts = Counter(
            f"{of}_worker_restarts", "Restarts of worker processes.", ["device"], registry=registry
        )
        self.batch_size = Histogram(
            f"{of}_batch_pictures", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.stage_seconds = Histogram(
            f"{of}_stage_seconds",
            "Seconds per batch, by stage.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            f"{of}_wait_seconds",
            "Seconds from a request to the start of its job.",
            buckets=SECONDS,
            registry=registry,
        )
        self.job_seconds = Histogram(
            f"{of}_job_seconds",
            "Seconds from a request to the end of its job.",
            buckets=SECONDS,
            registry=registry,
        )
        self.worker_memory = Gauge(
            f"{of}_worker_memory_bytes", "Resident memory of a worker.", ["device"], registry=registry
        )
        self.device_memory = Gauge(
            f"{of}_device_memory_bytes", "Peak memory allocated on a GPU.", ["device"], registry=registry
        )
        self.joules = Counter(
            f"{of}_energy_joules", "Energy used by the GPU during generation.", ["device"], registry=registry
        )

    def watch(
        self, waiting: Callable[[], float], open_jobs: Callable[[], float], ready: Callable[[], float]
    ) -> None:
        """Sets the functions that return the current values of the gauges."""
        self.waiting.set_function(waiting)
        self.open_jobs.set_function(open_jobs)
        self.ready.set_function(ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)
