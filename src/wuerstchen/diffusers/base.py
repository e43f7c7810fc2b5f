"""The base of all pipelines: components, devices, progress bars, loading and saving."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wuerstchen.checkpoints.diffusers import COMBINED_PIPELINE, DECODER_PIPELINE, pipeline_class
from wuerstchen.device import checked_device
from wuerstchen.diffusers.loading import LoadOptions
from wuerstchen.diffusers.options import checked_device_map, drop_options
from wuerstchen.diffusers.outputs import Config
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.runtime.offload import Layerwise, OneAtATime, Residence
from wuerstchen.runtime.recorder import Recorder, Recorders

AnyPipeline = TypeVar("AnyPipeline", bound="DiffusionPipeline")


class DiffusionPipeline:
    """The base of all pipelines. ``DiffusionPipeline.from_pretrained`` returns the class that a folder holds.

    Components are plain attributes: to compile one, set ``pipe.prior = torch.compile(pipe.prior)``.
    """

    model_cpu_offload_seq: str | None = None
    _callback_tensor_inputs: tuple[str, ...] = ("latents",)
    _component_names: tuple[str, ...] = ()
    _network_name: str = ""
    """The component that defines the pipeline's dtype and device."""
    hf_device_map: dict[str, str] | None = None
    """The device of each network, if ``device_map`` was given."""

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
        """Loads a pipeline from a folder, or by its name on the hub, onto the CPU.

        Takes diffusers' options: ``dtype`` or ``torch_dtype`` (default float32; "auto" keeps the stored
        dtype; a dict sets it per component, with ``default`` for the others), ``variant``, ``revision``,
        ``cache_dir``, ``force_download``, ``local_files_only``, ``token``, and ``use_safetensors=True`` to
        refuse other files. Components and config values that you pass are not loaded. ``device_map``
        is a device, or "balanced" for the first GPU, for the whole pipeline. Options without effect here,
        such as ``low_cpu_mem_usage``, are ignored. Others are refused with the reason.

        A combined pipeline can also be loaded from a decoder's folder that names its prior. Options with the
        prefix ``prior_`` apply to the prior. Without them, it is loaded with the decoder's options, except
        for the revision. ``prior`` is a folder or a name on the hub to load the prior from.

        Raises ``CheckpointError`` for damaged folders and other pipelines, ``UserError`` for options that are
        not supported, and ``TypeError`` for names that diffusers does not know either.
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
        """A pipeline that shares another's components and config values, except for those in ``parts``.

        The prior's and the decoder's pipeline can be made from a combined one. A dtype converts the shared
        networks. Offloading is not copied. Raises ``UserError`` if components are missing.
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
            raise UserError(
                f"Components are missing: {', '.join(missing)}. A {kind.__name__} needs them. Pass "
                "them by name."
            )
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
        """Writes the pipeline in the published layout, one file per network, replacing an earlier pipeline.

        ``hub_options`` are diffusers' options for ``push_to_hub``, which is not supported. Raises
        ``UserError`` for that, and for components that the layout cannot hold.
        """
        for name in hub_options.keys() - {"commit_message", "private", "create_pr", "token", "repo_id"}:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")
        if push_to_hub:
            raise UserError(
                "push_to_hub is not supported. Pipelines are only saved to local folders. Save the pipeline, "
                "then run: hf upload OWNER/NAME FOLDER"
            )
        if not safe_serialization or variant is not None:
            raise UserError(
                "safe_serialization=False and variant are not supported. Only safetensors without a variant "
                "are written. Remove both arguments."
            )
        self._write(Path(save_directory))

    @classmethod
    def _places(cls, options: LoadOptions, settings: dict[str, Any]) -> tuple[Any, ...]:
        """The last arguments of ``_arguments``. Removes the options that it uses from ``settings``."""
        return (options,)

    @classmethod
    def _arguments(cls, folder: Path, given: dict[str, Any], *places: Any) -> dict[str, Any]:
        """The arguments of ``__init__``: those in ``given``, and the rest from ``folder``."""
        raise NotImplementedError

    def _loaded_from(self, folder: Path) -> None:
        """Called after loading, to keep other information from the folder."""

    def _write(self, folder: Path) -> None:
        """Writes the pipeline into ``folder``, replacing an earlier one."""
        raise NotImplementedError

    @property
    def config(self) -> Config:
        """The pipeline's config values, as in ``model_index.json``."""
        return self._config

    def _pipes(self) -> "tuple[DiffusionPipeline, ...]":
        """The pipelines that this one consists of: itself, or its two parts."""
        return (self,)

    @property
    def components(self) -> dict[str, Any]:
        """All components by name. Another pipeline can be built from them and share their memory."""
        return {name: getattr(self, name) for name in self._component_names}

    def _networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """The device of the pipeline's network."""
        return device_of(getattr(self, self._network_name))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pipeline's network."""
        return dtype_of(getattr(self, self._network_name))

    @property
    def _execution_device(self) -> torch.device:
        """The device that the pipeline computes on. With offloading, its networks are elsewhere."""
        residence = self._pipes()[-1]._residence
        return self.device if residence is None else residence.device

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current or last call. Callbacks may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
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
        """Moves or converts all networks: ``to("cuda")``, ``to(torch.float16)``, or both.

        Setting a device ends offloading. Returns the pipeline.
        """
        device, dtype = device_and_dtype((*args, device, torch_device), (dtype, torch_dtype))
        for pipe in self._pipes():
            pipe.maybe_free_model_hooks()
            pipe._residence = pipe._residence if device is None else None
            pipe._recorders.clear()  # they keep memory of the device
        for network in self._networks().values():
            network.to(device=device, dtype=dtype)
        return self

    def reset_device_map(self) -> None:
        """Undoes ``device_map``: moves all networks to the CPU."""
        self.to("cpu")
        self.hf_device_map = None

    @contextmanager
    def _using(self, network: nn.Module | None) -> Iterator[torch.device]:
        """A context in which ``network`` can run. Yields the device that its inputs must be on."""
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
        """The network, or a ``function`` of it, recorded if it stays on a GPU."""
        for old in self._recorders.keys() - set(self._networks().values()):
            del self._recorders[old]  # the component was replaced
        self._recorders.records = self._residence is None
        return self._recorders.of(network, function, prepare)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Keeps the networks on the CPU, and moves each to the device while it is needed.

        The device defaults to the first accelerator.
        """
        self._offload(OneAtATime, gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Like ``enable_model_cpu_offload``, one layer at a time: needs the least memory, but is far
        slower."""
        self._offload(Layerwise, gpu_id, device)

    def _offload(
        self,
        kind: type[OneAtATime] | type[Layerwise],
        gpu_id: int | None,
        device: str | torch.device | None,
    ) -> None:
        target = _offload_device(gpu_id, device)
        self.to("cpu")
        for pipe in self._pipes():
            pipe._residence = kind(target)

    def maybe_free_model_hooks(self) -> None:
        """Moves offloaded networks back to the CPU. Called at the end of every call."""
        for pipe in self._pipes():
            if pipe._residence is not None:
                pipe._residence.release()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> tqdm:
        """A progress bar over ``iterable``, or with ``total`` steps for manual updates."""
        if (iterable is None) == (total is None):
            raise UserError("A progress bar needs either `iterable` or `total`. Pass one of them.")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Sets tqdm's options for later progress bars: ``disable=True`` hides them."""
        self._progress_bar_config = kwargs

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Changes nothing, and warns: attention never stores the whole matrix of scores here."""
        _already_efficient("enable_xformers_memory_efficient_attention")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Changes nothing."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Changes nothing, and warns: attention never stores the whole matrix of scores here."""
        _already_efficient("enable_attention_slicing")

    def disable_attention_slicing(self) -> None:
        """Changes nothing."""

    def __repr__(self) -> str:
        parts = (f"  {name}: {type(part).__name__}" for name, part in self.components.items())
        settings = (f"  {name}={value}" for name, value in self.config.items())
        return "\n".join([f"{type(self).__name__}(", *parts, *settings, ")"])


PIPELINES: dict[str, type[DiffusionPipeline]] = {}
"""The pipelines by their class names in ``model_index.json``."""


def published(kind: type[AnyPipeline]) -> type[AnyPipeline]:
    """Decorator that registers a pipeline in ``PIPELINES``."""
    PIPELINES[kind.__name__] = kind
    return kind


def load(kind: Any, name_or_path: str | Path, settings: dict[str, Any]) -> Any:
    """``kind.from_pretrained``. For the base class, the folder decides which pipeline it is."""
    settings = dict(settings)
    device = checked_device_map(settings.pop("device_map", None), settings.pop("max_memory", None))
    connected = settings.pop("load_connected_pipeline", False)
    if "use_auth_token" in settings:  # the name of old scripts
        settings.setdefault("token", settings.pop("use_auth_token"))
    drop_options(settings)
    options = LoadOptions(settings)
    folder = options.folder(name_or_path)
    if kind is DiffusionPipeline:
        name = pipeline_class(folder)
        kind = PIPELINES[COMBINED_PIPELINE if connected and name == DECODER_PIPELINE else name]
    places = kind._places(options, settings)
    known = list(inspect.signature(kind).parameters)
    for name in settings:
        if name not in known:
            raise TypeError(
                f"{kind.__name__}.from_pretrained() got an unexpected keyword argument {name!r}. The "
                f"components that can be passed are {', '.join(known)}."
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
            raise UserError(f"device={device} does not match gpu_id={gpu_id}. Pass only one of them.")
    elif torch.cuda.is_available():
        target = torch.device("cuda")
    elif torch.backends.mps.is_available():
        target = torch.device("mps")
    else:
        raise UserError("There is no accelerator to offload from. Do not call this method, or pass a device.")
    return target if gpu_id is None else checked_device(f"{target.type}:{gpu_id}")


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def plain(network: Any) -> Any:
    """The original of a network that ``torch.compile`` may have wrapped."""
    return getattr(network, "_orig_mod", network)


def check_network(name: str, network: Any, kind: type[nn.Module]) -> None:
    """Raises ``TypeError`` for a network of another class, such as diffusers'. It may be compiled."""
    if not isinstance(plain(network), kind):
        raise TypeError(
            f"{name} must be a {kind.__module__}.{kind.__name__}, got {type(network)}. "
            "from_pretrained loads diffusers' weights into one."
        )


def check_positive(**numbers: Any) -> None:
    """Raises ``UserError`` for numbers that are not above 0."""
    for name, value in numbers.items():
        if not value > 0:
            raise UserError(f"{name} must be above 0, got {value}. Use the number from the model.")


def check_text_width(pipe: "DiffusionPipeline", width: int | None, part: str) -> None:
    """Raises ``UserError`` if the text encoder's states do not have the ``width`` that ``part`` reads."""
    config = getattr(plain(getattr(pipe, "text_encoder", None)), "config", None)
    found = getattr(config, "hidden_size", width)
    if found != width:
        raise UserError(
            f"The text encoder's states are {found} wide. The {part} reads states {width} wide. "
            "Load both from the same model."
        )


def device_and_dtype(
    values: Sequence[Any], dtypes: Sequence[Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype in the arguments of ``to``. ``values`` may have both.

    Raises ``UserError`` if one is given twice, or if there is no such device.
    """
    device, dtype = None, None
    for value in (*values, *dtypes):
        if isinstance(value, torch.dtype):
            dtype = _once("dtype", dtype, value)
        elif value is not None:
            device = _once("device", device, value)
    return None if device is None else checked_device(device), dtype


def _once(name: str, earlier: Any, value: Any) -> Any:
    if earlier is not None:
        raise UserError(f"{name} was given twice: {earlier} and {value}. Pass it once.")
    return value


def _already_efficient(what: str) -> None:
    warnings.warn(f"{what} changes nothing: attention is always memory-efficient.", UserNotice, stacklevel=3)
