"""Makes the two lists of the evaluation, (a) pairs and (b) prompts, from the built emoji set.

Usage: python scripts/make_lists.py BUILT_SET

Order, colours, backgrounds and splits depend only on hashes and on the drawings, not on any model.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from wuerstchen.data.captions import MONO_STYLE, plain_caption
from wuerstchen.data.colours import name_colours
from wuerstchen.data.emoji import (
    HUE_SHIFTS,
    VAL_PAIRS,
    EmojiSource,
    shift_hue,
    val_of,
    visible_backgrounds,
    write_whole,
)
from wuerstchen.data.plan import stable_hash
from wuerstchen.evaluate.lists import (
    FILES,
    VAL_PROMPTS,
    Entry,
    prompt_text,
    subject_words,
)

PROMPTS = 480
HUELESS = {"black", "white", "gray"}


def reachable(rgba: np.ndarray) -> dict[str, list[int]]:
    """The colours that can become the dominant colour of an image by a hue shift, each with those shifts.

    Colours are named as in training. Shift 0 is the original image.
    """
    coarse = rgba[::4, ::4]
    found: dict[str, list[int]] = {}
    for shift in (0, *range(*HUE_SHIFTS)):
        for colour in name_colours(shift_hue(coarse, shift) if shift else coarse)[:1]:
            if colour not in HUELESS:
                found.setdefault(colour, []).append(shift)
    return found


def rarest(choices: Iterable[str], used: Counter[str], *key: str) -> str:
    """The least used choice, so that choices are as balanced as possible. Ties are broken by hash."""
    return min(choices, key=lambda choice: (used[choice], stable_hash(*key, choice)))


def pairs(source: EmojiSource) -> list[Entry]:
    """List (a): each held-out pair once, ordered by hash."""
    records = sorted(source.records, key=lambda record: stable_hash("evaluate pairs", record.id))
    val = val_of([record.id for record in records], VAL_PAIRS)
    return [
        Entry(
            number=number,
            style=record.style,
            hex=record.hex,
            name=record.names[0],
            colour=None,
            shift=0,
            background="white",
            caption=plain_caption(record.style, record.names[0]),
            split="val" if record.id in val else "test",
        )
        for number, record in enumerate(records)
    ]


def prompts(source: EmojiSource) -> list[Entry]:
    """List (b): the first held-out pairs, in another order of hashes, that can be recoloured."""
    order = sorted(
        range(len(source)), key=lambda item: stable_hash("evaluate prompts", source.records[item].id)
    )
    val = val_of([str(number) for number in range(PROMPTS)], VAL_PROMPTS)
    colours_used: Counter[str] = Counter()
    backgrounds_used: Counter[str] = Counter()
    entries: list[Entry] = []
    for item in order:
        if len(entries) == PROMPTS:
            break
        record, rgba = source.records[item], source.rgba(item)
        name = record.names[0]
        colour, shift = None, 0
        if record.style != MONO_STYLE:
            shifts = reachable(rgba)
            # "an orange orange" would not show whether the model follows the colour.
            free = sorted(set(shifts) - set(subject_words(name).split(" ")))
            if not free:
                continue
            colour = rarest(free, colours_used, "evaluate colour", record.id)
            colours_used[colour] += 1
            # Do not shift the hue if the image already has the colour.
            shift = min(shifts[colour], key=lambda s: (s > 0, stable_hash("evaluate shift", record.id, s)))
        shown = shift_hue(rgba, shift) if shift else rgba
        hidden = "black" if colour is None else colour
        visible = [b for b in visible_backgrounds(shown, record.style) if b != hidden]
        if not visible:
            continue
        background = rarest(visible, backgrounds_used, "evaluate background", record.id)
        backgrounds_used[background] += 1
        number = len(entries)
        entries.append(
            Entry(
                number=number,
                style=record.style,
                hex=record.hex,
                name=name,
                colour=colour,
                shift=shift,
                background=background,
                caption=prompt_text(record.style, name, colour, background),
                split="val" if str(number) in val else "test",
            )
        )
    return entries


def main(root: Path) -> None:
    source = EmojiSource(root, split="heldout")
    for path, entries in ((FILES["a"], pairs(source)), (FILES["b"], prompts(source))):
        lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries]
        write_whole(path, "".join(lines).encode())
        for field in ("split", "style", "colour", "background"):
            print(path.name, len(entries), dict(Counter(getattr(entry, field) for entry in entries)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
