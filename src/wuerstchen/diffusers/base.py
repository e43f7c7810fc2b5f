"""What all pipelines share: their components, where those live, progress bars, loading and saving."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wuerstchen.checkpoints.diffusers import COMBINED_PIPELINE, DECODER_PIPELINE, pipeline_class
from wuerstchen.device import checked_device
from wuerstchen.diffusers.options import checked_device_map, drop_options
from wuerstchen.diffusers.outputs import Config
from wuerstchen.diffusers.source import Source
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.runtime.offload import Blockwise, OneAtATime, Residence
from wuerstchen.runtime.recorder import Recorder, Recorders

AnyPipeline = TypeVar("AnyPipeline", bound="DiffusionPipeline")


class DiffusionPipeline:
    """The base of all pipelines. ``DiffusionPipeline.from_pretrained`` gives the kind that a folder holds.

    Components are plain attributes: ``pipe.prior = torch.compile(pipe.prior)`` is all that compiling takes.
    """

    model_cpu_offload_seq: str | None = None
    _callback_tensor_inputs: tuple[str, ...] = ("latents",)
    _component_names: tuple[str, ...] = ()
    _network_name: str = ""
    """The component whose dtype and device are the pipeline's."""
    hf_device_map: dict[str, str] | None = None
    """Where ``device_map`` has put the networks."""

    def __init__(self, **settings: Any) -> None:
        self._config = Config(settings)
        self._residence: Residence | None = None
        self._recorders = Recorders()
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls: type[AnyPipeline], pretrained_model_name_or_path: str | Path, **settings: Any
    ) -> AnyPipeline:
        """Loads a pipeline from a folder, or by a name on the hub, onto the CPU.

        Settings are diffusers': ``dtype`` or ``torch_dtype`` (float32 unless given; "auto" as stored; or a
        dict by component, ``default`` for the others), ``variant``, ``revision``, ``cache_dir``,
        ``force_download``, ``local_files_only``, ``token``, ``use_safetensors=True`` to refuse other files;
        and components or numbers of the pipeline by name, which are then not read. ``device_map`` is a
        device, or "balanced" for the first GPU, and takes the whole pipeline. Options that change nothing
        here, such as ``low_cpu_mem_usage``, are accepted; others are refused with the reason.

        For a combined pipeline, which a decoder's folder gives too if it names its prior, the prior's
        settings are these with ``prior_`` before the name; without them it is loaded as the decoder is, but
        for the revision. ``prior`` is a folder or a name on the hub to take the prior from.

        Raises ``CheckpointError`` for what is no Würstchen pipeline or damaged, ``UserError`` for options
        that cannot be used, ``TypeError`` for names that are no options of diffusers either.
        """
        return load(cls, pretrained_model_name_or_path, settings)

    @classmethod
    def from_pipe(
        cls: type[AnyPipeline],
        pipeline: "DiffusionPipeline",
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **parts: Any,
    ) -> AnyPipeline:
        """A pipeline of another's components and numbers, which both then share, but for those in ``parts``.

        A combined pipeline gives its halves too. A dtype converts the shared networks. Offloading is not
        taken over. Raises ``UserError`` if components are missing.
        """
        drop_options(parts)
        source = next((pipe for pipe in (pipeline, *pipeline._pipes()) if isinstance(pipe, cls)), pipeline)
        source.maybe_free_model_hooks()
        kind = type(source) if cls is DiffusionPipeline else cls
        known = inspect.signature(kind).parameters
        shared = {
            name: part for name, part in (source.components | dict(source.config)).items() if name in known
        }
        arguments = shared | parts
        if missing := [name for name in kind._component_names if name not in arguments]:
            raise UserError(f"components {', '.join(missing)} are missing; give them by name")
        pipe: Any = kind(**arguments)
        return pipe.to(dtype=dtype, torch_dtype=torch_dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **hub_options: Any,
    ) -> None:
        """Writes the pipeline as published, over an earlier one in that folder; a network is one file.

        ``hub_options`` are diffusers' for ``push_to_hub``, which is refused. Raises ``UserError`` for that,
        and for what the layout has no place for.
        """
        for name in hub_options.keys() - {"commit_message", "private", "create_pr", "token", "repo_id"}:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")
        if push_to_hub:
            raise UserError(
                "push_to_hub cannot be used. Pipelines are only written to folders here. Save the pipeline "
                "first, then run: hf upload OWNER/NAME FOLDER"
            )
        if not safe_serialization or variant is not None:
            raise UserError("only safetensors without a variant are written; leave both arguments out")
        self._write(Path(save_directory))

    @classmethod
    def _places(cls, source: Source, settings: dict[str, Any]) -> tuple[Any, ...]:
        """What ``_arguments`` reads from. Takes the settings that say so out of ``settings``."""
        return (source,)

    @classmethod
    def _arguments(cls, folder: Path, given: dict[str, Any], *places: Any) -> dict[str, Any]:
        """What the pipeline is made of: parts and numbers ``given``, the rest read from ``folder``."""
        raise NotImplementedError

    def _loaded_from(self, folder: Path) -> None:
        """Keeps what else the folder says."""

    def _write(self, folder: Path) -> None:
        """Writes the pipeline over an earlier one in ``folder``."""
        raise NotImplementedError

    @property
    def config(self) -> Config:
        """The pipeline's numbers, as they stand in ``model_index.json``."""
        return self._config

    def _pipes(self) -> "tuple[DiffusionPipeline, ...]":
        """The pipelines that do the work: this one, where it is not made of others."""
        return (self,)

    @property
    def components(self) -> dict[str, Any]:
        """All components by name: another pipeline can be built from them, sharing their memory."""
        return {name: getattr(self, name) for name in self._component_names}

    def _networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the pipeline's network is."""
        return device_of(getattr(self, self._network_name))

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline's network computes in."""
        return dtype_of(getattr(self, self._network_name))

    @property
    def _execution_device(self) -> torch.device:
        """Where the pipeline computes, which with offloading is not where its networks wait."""
        residence = self._pipes()[-1]._residence
        return self.device if residence is None else residence.device

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the call that runs, or ran last. A callback changes ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or ran last."""
        return self._num_timesteps

    def to(
        self: AnyPipeline,
        *args: Any,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        torch_device: str | int | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> AnyPipeline:
        """Moves or converts all networks: ``to("cuda")``, ``to(torch.float16)``, or both in this order.

        A device ends offloading. Returns the pipeline.
        """
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = _once("dtype", dtype, value)
            elif value is not None:
                device = _once("device", device, value)
        device = device if torch_device is None else _once("device", device, torch_device)
        dtype = dtype if torch_dtype is None else _once("dtype", dtype, torch_dtype)
        device = None if device is None else checked_device(device)
        for pipe in self._pipes():
            pipe.maybe_free_model_hooks()
            pipe._residence = pipe._residence if device is None else None
            pipe._recorders.clear()  # they keep memory of the device
        for network in self._networks().values():
            network.to(device=device, dtype=dtype)
        return self

    def reset_device_map(self) -> None:
        """Undoes ``device_map``: all networks go back to the CPU."""
        self.to("cpu")
        self.hf_device_map = None

    @contextmanager
    def _using(self, network: nn.Module | None) -> Iterator[torch.device]:
        """While it lasts, ``network`` can run; gives the device that its inputs must be on."""
        if network is None or self._residence is None:
            yield self.device if network is None else device_of(network)
            return
        with self._residence.using(network):
            yield self._residence.device

    def _recorded(
        self,
        network: nn.Module,
        function: Callable[..., Tensor] | None = None,
        prepare: Callable[..., Any] | None = None,
    ) -> Recorder:
        """The network, or a ``function`` of it, recorded where it stays on a GPU."""
        for old in self._recorders.keys() - set(self._networks().values()):
            del self._recorders[old]  # another has taken its place
        return self._recorders.of(network, function, prepare, records=self._residence is None)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Keeps the networks on the CPU, from where each visits the device as long as it is needed.

        The device is the one named, or the first accelerator that is there.
        """
        self._offload(OneAtATime, gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """As ``enable_model_cpu_offload``, a layer at a time: the least memory, and far slower."""
        self._offload(Blockwise, gpu_id, device)

    def _offload(
        self,
        kind: type[OneAtATime] | type[Blockwise],
        gpu_id: int | None,
        device: str | torch.device | None,
    ) -> None:
        target = _offload_device(gpu_id, device)
        self.to("cpu")
        for pipe in self._pipes():
            pipe._residence = kind(target)

    def maybe_free_model_hooks(self) -> None:
        """Sends offloaded networks back to the CPU. Every call ends with it."""
        for pipe in self._pipes():
            if pipe._residence is not None:
                pipe._residence.release()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> tqdm:
        """A bar over ``iterable``, or one of ``total`` steps that is moved by hand."""
        if (iterable is None) == (total is None):
            raise UserError("a progress bar needs either `iterable` or `total`; give one of them")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Settings of the bars to come, as tqdm takes them: ``disable=True`` hides them."""
        self._progress_bar_config = kwargs

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Changes nothing, and says so: attention never holds the whole table of scores here."""
        _already_efficient("enable_xformers_memory_efficient_attention")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Changes nothing."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Changes nothing, and says so: attention never holds the whole table of scores here."""
        _already_efficient("enable_attention_slicing")

    def disable_attention_slicing(self) -> None:
        """Changes nothing."""

    def __repr__(self) -> str:
        parts = (f"  {name}: {type(part).__name__}" for name, part in self.components.items())
        settings = (f"  {name}={value}" for name, value in self.config.items())
        return "\n".join([f"{type(self).__name__}(", *parts, *settings, ")"])


PIPELINES: dict[str, type[DiffusionPipeline]] = {}
"""The pipelines that folders may hold, by the name in ``model_index.json``."""


def published(kind: type[AnyPipeline]) -> type[AnyPipeline]:
    """Decorates a pipeline that folders may hold."""
    PIPELINES[kind.__name__] = kind
    return kind


def load(kind: Any, name_or_path: str | Path, settings: dict[str, Any]) -> Any:
    """``kind.from_pretrained``; the base of all pipelines stands for the one that the folder holds."""
    settings = dict(settings)
    device = checked_device_map(settings.pop("device_map", None), settings.pop("max_memory", None))
    connected = settings.pop("load_connected_pipeline", False)
    if "use_auth_token" in settings:  # the name of old scripts
        settings.setdefault("token", settings.pop("use_auth_token"))
    drop_options(settings)
    source = Source(settings)
    folder = source.folder(name_or_path)
    if kind is DiffusionPipeline:
        name = pipeline_class(folder)
        kind = PIPELINES[COMBINED_PIPELINE if connected and name == DECODER_PIPELINE else name]
    places = kind._places(source, settings)
    known = list(inspect.signature(kind).parameters)
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{kind.__name__}.from_pretrained() got an unexpected keyword argument {name!r}; its parts "
                f"are {', '.join(known)}"
            )
    pipe = kind(**kind._arguments(folder, settings, *places))
    pipe._loaded_from(folder)
    if device is not None:
        pipe.to(device)
        pipe.hf_device_map = dict.fromkeys(pipe._networks(), str(device))
    return pipe


def _offload_device(gpu_id: int | None, device: str | torch.device | None) -> torch.device:
    if device is not None:
        target = checked_device(device)
        if gpu_id is not None and target.index not in (None, gpu_id):
            raise UserError(f"device {device} is not number gpu_id={gpu_id}; give only one of them")
    elif torch.cuda.is_available():
        target = torch.device("cuda")
    elif torch.backends.mps.is_available():
        target = torch.device("mps")
    else:
        raise UserError("there is no accelerator to offload from; leave offloading out, or name a device")
    return target if gpu_id is None else checked_device(f"{target.type}:{gpu_id}")


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def plain(network: Any) -> Any:
    """The network under ``torch.compile``."""
    return getattr(network, "_orig_mod", network)


def check_network(name: str, network: Any, kind: type[nn.Module]) -> None:
    """Raises ``TypeError`` for a network of another kind, such as diffusers' own. A compiled one is fine."""
    if not isinstance(plain(network), kind):
        raise TypeError(
            f"{name} must be a {kind.__module__}.{kind.__name__}, but got {type(network)}; "
            "from_pretrained reads diffusers' weights into one"
        )


def check_positive(**numbers: Any) -> None:
    """Raises ``UserError`` for a number of the pipeline that is not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(f"{name} is {value}. It must be above 0. Give the number that the model has.")


def check_text_width(pipe: "DiffusionPipeline", width: int | None, part: str) -> None:
    """Raises ``UserError`` if the text encoder's states are not ``width`` wide, as ``part`` reads them."""
    config = getattr(plain(getattr(pipe, "text_encoder", None)), "config", None)
    found = getattr(config, "hidden_size", width)
    if found != width:
        raise UserError(
            f"The text encoder's states are {found} wide. The {part} reads states {width} wide. "
            "Load both from the same model."
        )


def _once(name: str, earlier: Any, value: Any) -> Any:
    if earlier is not None:
        raise UserError(f"{name} was given twice, as {earlier} and {value}; give it once")
    return value


def _already_efficient(what: str) -> None:
    warnings.warn(f"{what} changes nothing: attention is memory-efficient already", UserNotice, stacklevel=3)
