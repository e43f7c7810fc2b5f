"""Adapters (LoRA) of the prior pipeline, with diffusers' names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wuerstchen import lora
from wuerstchen.checkpoints.adapters import wanted_files
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.errors import UserError

Weight = float | int | Mapping[str, float | int] | None


class LoraMethods:
    """What the pipelines with a prior offer; adapters act on Stage C and its text encoder."""

    def _lora_networks(self) -> dict[str, nn.Module]:
        raise NotImplementedError

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        """Adds an adapter and lets it alone act: from a file, a folder, a name on the hub, or tensors.

        Without a name it is called ``default_0``, ``default_1`` and so on. See ``wuerstchen.lora.load_lora``.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | Path):
            source = local_folder(
                source,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                only=wanted_files(weight_name, subfolder),
            )
            source = source / (subfolder or "")
        networks = self._lora_networks()
        if adapter_name is None:
            taken = {name for network in networks.values() for name in lora.lora_names(network)}
            adapter_name = next(
                name for name in map("default_{}".format, range(len(taken) + 1)) if name not in taken
            )
        lora.load_lora(
            networks["prior"],
            source,
            adapter_name=adapter_name,
            weight_name=weight_name,
            text_encoder=networks.get("text_encoder"),
        )
        self._activate([adapter_name], [1.0])

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Writes an adapter's tensors, of the prior (called ``unet`` here) and of its text encoder."""
        if not safe_serialization:
            raise UserError("only safetensors are written; leave safe_serialization out")
        if is_main_process:
            lora.save_lora(
                save_directory,
                unet_lora_layers or {},
                text_encoder_layers=text_encoder_lora_layers,
                weight_name=weight_name or lora.WEIGHT_NAME,
            )

    def unload_lora_weights(self) -> None:
        """Takes all adapters out. What is fused stays in the weights."""
        for network in self._lora_networks().values():
            lora.unload_lora(network)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float | int = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds the adapters that act, or those named, to the weights: they then cost nothing."""
        networks = self._chosen(components)
        wanted = None if adapter_names is None else _names(adapter_names)
        if wanted is not None:
            self._check_names(wanted)
        plans = []
        for network in networks.values():
            present = lora.active_loras(network) if wanted is None else _present(network, wanted)
            plans.append((network, present))
        if not any(present for _, present in plans):
            raise UserError("no adapter is active, so there is nothing to fuse; load or activate one")
        for network, present in plans:
            if present:
                lora.fuse_lora(network, scale=lora_scale, names=present, safe=safe_fusing)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Subtracts what was fused. The weights are the old ones up to rounding."""
        for network in self._chosen(components).values():
            lora.unfuse_lora(network)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: Weight | Sequence[Weight] = None,
    ) -> None:
        """Lets exactly these adapters act, each times its weight: one for all, or one for each.

        A weight may be a dict of weights for ``prior`` and ``text_encoder``; 1 where one is missing.
        """
        names = _names(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, int | float | Mapping):
            adapter_weights = [adapter_weights] * len(names)
        weights = [1.0 if weight is None else weight for weight in adapter_weights]
        if len(weights) != len(names):
            raise UserError(f"{len(weights)} weights do not fit {len(names)} adapters; give one for each")
        self._check_names(names)
        known = self._lora_networks()
        for part in (part for weight in weights if isinstance(weight, Mapping) for part in weight):
            if part not in known:
                raise UserError(f"no adapter acts on {part!r}; give weights for {' and '.join(known)}")
        self._activate(names, weights)

    def get_active_adapters(self) -> list[str]:
        """The adapters that act."""
        networks = self._lora_networks().values()
        return list(dict.fromkeys(name for network in networks for name in lora.active_loras(network)))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """All adapters that are loaded, for each network that has any."""
        networks = self._lora_networks().items()
        return {name: lora.lora_names(network) for name, network in networks if lora.lora_names(network)}

    def disable_lora(self) -> None:
        """Turns all adapters off."""
        for network in self._lora_networks().values():
            lora.enable_lora(network, False)

    def enable_lora(self) -> None:
        """Turns the adapters that acted on again."""
        for network in self._lora_networks().values():
            lora.enable_lora(network, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters out for good."""
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
                    f"adapter {name!r} is not loaded; loaded are: {', '.join(sorted(known)) or 'none'}"
                )

    def _chosen(self, components: Sequence[str] | None) -> dict[str, nn.Module]:
        """The networks named, all if none is; ``unet`` is diffusers' word for the prior."""
        networks: dict[str, Any] = self._lora_networks()
        if components is None:
            return networks
        names = ["prior" if name == "unet" else name for name in _names(components)]
        if unknown := [name for name in names if name not in networks]:
            raise UserError(f"components {', '.join(unknown)} take no adapters; use {', '.join(networks)}")
        return {name: networks[name] for name in names}


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _present(network: nn.Module, names: Sequence[str]) -> list[str]:
    known = lora.lora_names(network)
    return [name for name in names if name in known]
