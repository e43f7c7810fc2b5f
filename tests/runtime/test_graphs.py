"""Which calls recording makes to the device, and in which order, with a fake ``torch.cuda``."""

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from wuerstchen.runtime import graphs
from wuerstchen.runtime.recorder import Recorder, _BoundArguments
from wuerstchen.train.engine.update import StepRunner, TrainStep


class FakeCuda:
    """A fake ``torch.cuda``. ``log`` holds the calls and their streams."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        self.current = FakeStream(self, "main")
        self.graphs = 0
        self.alive: weakref.WeakSet[FakeGraph] = weakref.WeakSet()
        self.fails = False
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(self, "side"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        for name in ("copy_", "clone"):
            monkeypatch.setattr(Tensor, name, self.logged(name, getattr(Tensor, name)))
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, stream: self.write(f"memory used on {stream.name}")
        )

    def write(self, what: str) -> None:
        self.log.append(f"{self.current.name}: {what}")

    def logged(self, name, method):
        def run(tensor, *given, **more):
            self.write(f"{name} non_blocking" if more.get("non_blocking") else name)
            return method(tensor, *given, **more)

        return run

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        """Like the real one, it leaves its stream the current one if the capture fails to end."""
        before, self.current = self.current, stream
        self.write(f"record {graph.name}, pool {pool}, {capture_error_mode}")
        yield
        self.write("end")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before

    def taken(self) -> list[str]:
        log, self.log = self.log, []
        return log


class FakeStream(torch.cuda.Stream):
    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph(torch.cuda.CUDAGraph):
    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, cuda):
        cuda.graphs += 1
        cuda.alive.add(self)
        self.cuda, self.name = cuda, f"graph {cuda.graphs}"

    def pool(self):
        return "shared"

    def replay(self):
        self.cuda.write(f"replay {self.name}")


@pytest.fixture
def cuda(monkeypatch):
    graphs.recording_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    graphs.recording_stream.cache_clear()


WARM_UP = ["side waits for main", "side: run", "main waits for side"]


def test_sampling_makes_the_same_calls_in_the_same_order(cuda):
    """The first pass of a kind runs on the side stream, the second is recorded, and all are replayed."""

    def prepare(text):
        cuda.write("prepare")
        return text + 1

    def run(x, prepared):
        cuda.write("run")
        return x * prepared

    recorder = Recorder(nn.Linear(1, 1), run, prepare)
    x, first, second = torch.ones(2), _BoundArguments((torch.zeros(2),)), _BoundArguments((torch.ones(2),))
    assert recorder._recorded((x,), first).tolist() == [1, 1]
    assert cuda.taken() == [
        *("side waits for main", "side: prepare", "side: run", "main waits for side"),
        "main: memory used on main",
    ]
    recorder._recorded((x,), first)
    assert cuda.taken() == [
        *("main: clone", "side: record graph 1, pool None, thread_local", "side: prepare", "side: end"),
        *("main: copy_", "main: replay graph 1"),
        *("main: clone", "side: record graph 2, pool shared, thread_local", "side: run", "side: end"),
        *("main: copy_", "main: replay graph 2", "main: clone"),
    ]
    recorder._recorded((x,), first)
    assert cuda.taken() == ["main: copy_", "main: replay graph 2", "main: clone"]
    recorder._recorded((x,), second)  # another text of the same shape
    assert cuda.taken() == [
        *("main: copy_", "main: replay graph 1"),
        *("main: copy_", "main: replay graph 2", "main: clone"),
    ]
    recorder.forget()
    recorder._recorded((x,), first)
    assert cuda.taken()[0] == "side waits for main"


def test_every_thread_warms_up_before_it_records(cuda):
    """A second image, sampled in a new thread, was recorded before cuBLAS was ready in it, which fails."""
    recorder, x = Recorder(nn.Linear(1, 1), lambda x: x + 1), torch.ones(1)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(recorder._recorded, (x,), None).result()
    assert cuda.taken() == [*("side waits for main", "main waits for side"), "main: memory used on main"]
    recorder._recorded((x,), None)
    assert not any("record graph" in line for line in cuda.taken())
    for _ in range(2):
        recorder._recorded((x,), None)
    assert [line for line in cuda.taken() if "graph" in line] == [
        "side: record graph 1, pool None, thread_local",
        *["main: replay graph 1"] * 2,
    ]


def test_a_recording_that_fails_leaves_the_stream_as_it_was(cuda):
    """torch.cuda.graph does not if the capture cannot end."""
    cuda.fails = True
    recorded = graphs.Graphs(graphs.recording_stream(torch.device("cpu")), warm_ups=0)
    with pytest.raises(RuntimeError, match="previous error"):
        recorded.record("key", lambda x: x + 1, (torch.ones(1),))
    assert cuda.current.name == "main"
    assert "key" not in recorded
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(graphs._ONE_AT_A_TIME.acquire, blocking=False).result()
        thread.submit(graphs._ONE_AT_A_TIME.release).result()


def test_one_kind_too_many_drops_all_recordings(cuda, monkeypatch):
    monkeypatch.setattr("wuerstchen.runtime.recorder.MAX_KINDS", 2)
    recorder = Recorder(nn.Linear(1, 1), lambda x: x + 1)
    for size in (1, 2, 3):
        for _ in range(2):
            assert recorder._recorded((torch.ones(size),), None).tolist() == [2] * size
    assert list(recorder._graphs.warmed) == [(((torch.Size([3]), (1,), torch.float32),), None)]


class FakeStep(TrainStep):
    def __init__(self, cuda):
        self.cuda = cuda

    def __call__(self, inputs, indices):
        self.cuda.write("run")
        return {"loss": inputs["x"] + inputs["y"] + indices}

    def average(self):
        self.cuda.write("average")


def test_training_makes_the_same_calls_in_the_same_order(cuda):
    """Three updates of a shape run on the side stream, the fourth is recorded, and all from it on are
    replayed. The average follows outside of the recording."""
    update = StepRunner(FakeStep(cuda), record=True)
    inputs, indices = {"x": torch.ones(2), "y": torch.ones(2)}, torch.arange(2)
    for _ in range(3):
        assert update(inputs, indices)["loss"].tolist() == [2, 3]
        assert cuda.taken() == [*WARM_UP, "main: average"]
    replayed = ["main: copy_ non_blocking"] * 3
    update(inputs, indices)
    assert cuda.taken() == [
        *["main: clone"] * 3,
        *("side: record graph 1, pool None, thread_local", "side: run", "side: end"),
        *(*replayed, "main: replay graph 1", "main: average"),
    ]
    assert update(inputs, indices)["loss"].tolist() == [2, 3]
    assert cuda.taken() == [*replayed, "main: replay graph 1", "main: average"]
    smaller, some = {name: tensor[:1] for name, tensor in inputs.items()}, indices[:1]
    for _ in range(3):
        update(smaller, some)
        assert cuda.taken() == [*WARM_UP, "main: average"]
    update(smaller, some)
    assert cuda.taken()[3] == "side: record graph 2, pool shared, thread_local"
    assert len(cuda.alive) == 2
    update.close()  # NCCL waits for recordings
    gc.collect()
    assert not cuda.alive


def test_training_on_a_cpu_records_nothing(cuda):
    StepRunner(FakeStep(cuda), record=False)({"x": torch.ones(2), "y": torch.ones(2)}, torch.arange(2))
    assert cuda.taken() == ["main: run", "main: average"]
