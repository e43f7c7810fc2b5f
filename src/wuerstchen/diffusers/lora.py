"""Adapters (LoRA) of the prior's pipeline, with diffusers' names."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen import lora
from wuerstchen.checkpoints.adapters import wanted_files
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.device import checked_device
from wuerstchen.diffusers.base import device_of
from wuerstchen.diffusers.options import drop_options
from wuerstchen.errors import UserError

Weight = float | int | Mapping[str, float | int] | None


_PREFIXES = ("unet", "prior")


class LoraMethods:
    """Methods of the pipelines with a prior. Adapters apply to Stage C and its text encoder."""

    def _lora_networks(self) -> dict[str, nn.Module]:
        raise NotImplementedError

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = False,
        token: str | bool | None = None,
        force_download: bool | None = False,
        use_safetensors: bool | None = None,
        prefix: str | None = None,
        **options: Any,
    ) -> None:
        """Loads an adapter from a file, a folder, a name on the hub, or tensors, and makes it the only active
        one.

        The default names are ``default_0``, ``default_1`` and so on. See ``wuerstchen.lora.load_lora``.
        ``hotswap`` replaces the loaded adapter ``adapter_name`` and keeps which adapters are active, and
        their weights. ``use_safetensors=True`` refuses other files. The ``prefix`` of keys, "unet" or
        "prior", is detected. ``options`` are diffusers' options without effect here, such as
        ``low_cpu_mem_usage``. Raises ``UserError`` for unsupported ones.
        """
        drop_options(options)
        for name in options.keys() - {"return_lora_metadata"}:
            raise TypeError(f"load_lora_weights() got an unexpected keyword argument {name!r}")
        if prefix not in (None, *_PREFIXES):
            raise UserError(
                f"prefix={str(prefix)[:80]!r} is not supported. Keys must start with {', '.join(_PREFIXES)} "
                "or have no prefix. Rename them, and remove prefix."
            )
        networks = self._lora_networks()
        loaded = {name for network in networks.values() for name in lora.lora_names(network)}
        if hotswap and adapter_name not in loaded:
            raise UserError(
                f"hotswap=True needs the name of a loaded adapter, got {str(adapter_name)[:80]!r}. Loaded "
                f"adapters: {', '.join(sorted(loaded)) or 'none'}. Use one of them as adapter_name."
            )
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | Path):
            source = local_folder(
                source,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=bool(local_files_only),
                token=token,
                force_download=bool(force_download),
                only=wanted_files(weight_name, subfolder),
            )
            source = source / (subfolder or "")
            if use_safetensors and not _is_safetensors(source, weight_name):
                raise UserError(
                    f"{source} has no .safetensors files, which use_safetensors=True requires. Remove "
                    "use_safetensors=True to load its .bin files."
                )
        if adapter_name is None:
            adapter_name = _free_name(loaded)
        if hotswap:
            self._swap(source, adapter_name, weight_name)
        else:
            self._load(source, adapter_name, weight_name)
            self._activate([adapter_name], [1.0])

    def _load(self, source: Path | Mapping[str, Tensor], name: str, weight_name: str | None) -> None:
        networks = self._lora_networks()
        lora.load_lora(
            networks["prior"],
            source,
            adapter_name=name,
            weight_name=weight_name,
            text_encoder=networks.get("text_encoder"),
        )

    def _swap(self, source: Path | Mapping[str, Tensor], name: str, weight_name: str | None) -> None:
        """Replaces the adapter ``name``. Changes nothing if the new one cannot be loaded."""
        networks = self._lora_networks()
        before = {part: lora.chosen_loras(network) for part, network in networks.items()}
        trial = _free_name({name for network in networks.values() for name in lora.lora_names(network)})
        try:
            self._load(source, trial, weight_name)
            self.delete_adapters([trial, name])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lora.AssumedScaleWarning)  # the trial has warned already
                self._load(source, name, weight_name)
        finally:
            acted = {adapter: weight for chosen, _ in before.values() for adapter, weight in chosen.items()}
            on = all(on for _, on in before.values())
            for part, network in networks.items():
                chosen, _ = before[part]
                # The new adapter may apply to a network that the old one did not.
                wanted = chosen | ({name: acted[name]} if name in acted and name not in chosen else {})
                present = {a: weight for a, weight in wanted.items() if a in lora.lora_names(network)}
                lora.set_lora(network, list(present), list(present.values()))
                lora.enable_lora(network, on)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an adapter's tensors for the prior (called ``unet`` here) and its text encoder.

        The metadata are peft's ``LoraConfig.to_dict()``, which include the adapter's scale.
        """
        if not safe_serialization:
            raise UserError(
                "safe_serialization=False is not supported. Only safetensors are written. Remove it."
            )
        if save_function is not None:
            raise UserError(
                "save_function is not supported. Files are always written by safetensors, atomically. "
                "Remove it."
            )
        if is_main_process:
            lora.save_lora(
                save_directory,
                _tensors_of(unet_lora_layers),
                text_encoder_layers=_tensors_of(text_encoder_lora_layers),
                weight_name=weight_name or lora.WEIGHT_NAME,
                config=unet_lora_adapter_metadata,
                text_encoder_config=text_encoder_lora_adapter_metadata,
            )

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Moves adapters to a device. Inactive ones can stay on the CPU."""
        names, target = _names(adapter_names), checked_device(device)
        self._check_names(names)
        for network in self._lora_networks().values():
            lora.move_lora(network, names, target)

    def _check_lora_devices(self) -> None:
        """Raises ``UserError`` if an active adapter is on another device than its network."""
        for network in self._lora_networks().values():
            if names := lora.misplaced_loras(network):
                raise UserError(
                    f"Adapter {names[0]!r} is active, but on another device than its network. Both "
                    "must be on "
                    f"the same. Call set_lora_device({names[0]!r}, {str(device_of(network))!r})."
                )

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Changes nothing: adapters of any rank can be swapped without preparation."""

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are fused into the weights."""
        return {name for network in self._lora_networks().values() for name in lora.fused_loras(network)}

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    def unload_lora_weights(self) -> None:
        """Removes all adapters. Fused ones stay in the weights."""
        for network in self._lora_networks().values():
            lora.unload_lora(network)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float | int = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds the active adapters, or ``adapter_names``, to the weights, so that they cost no time."""
        networks = self._chosen(components)
        wanted = None if adapter_names is None else _names(adapter_names)
        if wanted is not None:
            self._check_names(wanted)
        plans = []
        for network in networks.values():
            present = lora.active_loras(network) if wanted is None else _present(network, wanted)
            plans.append((network, present))
        if not any(present for _, present in plans):
            raise UserError("There is nothing to fuse: no adapter is active. Load or activate one.")
        for network, present in plans:
            if present:
                lora.fuse_lora(network, scale=lora_scale, names=present, safe=safe_fusing)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Subtracts fused adapters. The weights equal the old ones up to rounding."""
        for network in self._chosen(components).values():
            lora.unfuse_lora(network)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight] = None,
    ) -> None:
        """Makes exactly these adapters active, with one weight for all or one for each.

        A weight may be a dict of weights for ``prior`` and ``text_encoder``. Missing ones are 1.
        """
        names = _names(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, int | float | Mapping):
            adapter_weights = [adapter_weights] * len(names)
        weights = [1.0 if weight is None else weight for weight in adapter_weights]
        if len(weights) != len(names):
            raise UserError(
                f"There must be one weight per adapter, got {len(weights)} weights and {len(names)} adapters."
            )
        self._check_names(names)
        known = self._lora_networks()
        for part in (part for weight in weights if isinstance(weight, Mapping) for part in weight):
            if part not in known:
                raise UserError(f"No adapter applies to {part!r}. Use weights for {' and '.join(known)}.")
        self._activate(names, weights)

    def get_active_adapters(self) -> list[str]:
        """The active adapters."""
        networks = self._lora_networks().values()
        return list(dict.fromkeys(name for network in networks for name in lora.active_loras(network)))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """All loaded adapters by network."""
        networks = self._lora_networks().items()
        return {name: lora.lora_names(network) for name, network in networks if lora.lora_names(network)}

    def disable_lora(self) -> None:
        """Turns all adapters off."""
        for network in self._lora_networks().values():
            lora.enable_lora(network, False)

    def enable_lora(self) -> None:
        """Turns the active adapters on again."""
        for network in self._lora_networks().values():
            lora.enable_lora(network, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters."""
        names = _names(adapter_names)
        self._check_names(names)
        for network in self._lora_networks().values():
            if present := _present(network, names):
                lora.delete_lora(network, present)

    def _activate(self, names: Sequence[str], weights: Sequence[Any]) -> None:
        for part, network in self._lora_networks().items():
            scales = {
                name: weight.get(part, 1.0) if isinstance(weight, Mapping) else weight
                for name, weight in zip(names, weights, strict=True)
            }
            present = _present(network, names)
            lora.set_lora(network, present, [scales[name] for name in present])

    def _check_names(self, names: Sequence[str]) -> None:
        known = {name for network in self._lora_networks().values() for name in lora.lora_names(network)}
        for name in names:
            if name not in known:
                raise UserError(
                    f"Adapter {name!r} is not loaded. Loaded adapters: {', '.join(sorted(known)) or 'none'}."
                )

    def _chosen(self, components: Sequence[str] | None) -> dict[str, nn.Module]:
        """The networks in ``components``, or all. ``unet`` is diffusers' name for the prior."""
        networks: dict[str, Any] = self._lora_networks()
        if components is None:
            return networks
        names = ["prior" if name == "unet" else name for name in _names(components)]
        if unknown := [name for name in names if name not in networks]:
            raise UserError(
                f"These components do not support adapters: {', '.join(unknown)}. Use {', '.join(networks)}."
            )
        return {name: networks[name] for name in names}


def _tensors_of(layers: Mapping[str, Tensor] | nn.Module | None) -> Mapping[str, Tensor]:
    return layers.state_dict() if isinstance(layers, nn.Module) else layers or {}


def _is_safetensors(source: Path, weight_name: str | None) -> bool:
    path = source / weight_name if weight_name is not None and source.is_dir() else source
    return any(path.glob("*.safetensors")) if path.is_dir() else path.suffix == ".safetensors"


def _free_name(taken: Collection[str]) -> str:
    """The first unused name of default_0, default_1 and so on."""
    return next(name for name in map("default_{}".format, range(len(taken) + 1)) if name not in taken)


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _present(network: nn.Module, names: Sequence[str]) -> list[str]:
    known = lora.lora_names(network)
    return [name for name in names if name in known]
