"""Compares the fields of recipes: which may change in a run, and which differ."""

FREE_FIELDS = frozenset(
    {
        "data",
        "start_from",
        "workers",
        "checkpoint_seconds",
        "log_every",
        "preview_every",
        "preview_prompts",
        "keep_every",
        "acceleration",
        "sharding",
        "recompute",
        "storage",
        "max_shard_size",
    }
)
"""Fields that may change whenever a run is resumed, because the result does not depend on them. It stays
equal bit for bit, or up to rounding for ``acceleration``, ``sharding`` and the number of processes. ``data``
and ``start_from`` are only locations. Their contents are checked by fingerprint. ``storage`` and
``max_shard_size`` are used when the model is written."""


_ADDED = {
    "stage_b.max_ratio": 1.0,
    "stage_c.max_ratio": 1.0,
    "image_column": "",
    "text_column": "",
    "memory": "normal",
    "stage_lora.base_weights": "half",
}
"""Fields that earlier versions did not record, with the values that they used."""


def differing_fields(stored: dict, given: dict, prefix: str = "") -> list[str]:
    """The fields in which two resolved recipes differ, with both values if they are short.

    Leaves out ``FREE_FIELDS``, and the settings of Stage A, students and adapters if they are not trained,
    and those of Stage C if an adapter for it is trained.
    """
    names = []
    optional = {"stage_a": "a", "stage_few": "few", "stage_few_b": "few_b", "stage_lora": "lora"}
    for key in sorted(stored.keys() | given.keys()):
        left_out = key in optional and optional[key] not in given.get("stages", optional.values())
        left_out |= key == "stage_c" and given.get("stages") == ["lora"]  # which reads none of it
        if not prefix and (key in FREE_FIELDS or left_out):
            continue
        a, b = stored.get(key, _ADDED.get(f"{prefix}{key}")), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing_fields(a, b, f"{prefix}{key}.")
        elif key == "phases" and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for number, (old, new) in enumerate(zip(a, b, strict=True)):
                names += differing_fields(old, new, f"{prefix}{key}.{number}.")
        elif a != b:
            values = f" ({a}, now {b})"
            names.append(f"{prefix}{key}{values if len(values) < 40 else ''}")
    return names
