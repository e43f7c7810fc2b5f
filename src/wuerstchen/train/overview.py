"""Describes the data of a run before its first update: images, captions, sizes and epochs."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from wuerstchen.data.caption_files import CaptionFile
from wuerstchen.data.emoji import EmojiSource
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.index import IndexedSource
from wuerstchen.data.mixture import MixedSource, named_parts
from wuerstchen.data.plan import generator, items_at
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.data.sources import Source, StoredImages
from wuerstchen.data.survey import MOST, SECONDS, ignored, sizes
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.text import TextEncoder
from wuerstchen.train.config import Recipe
from wuerstchen.train.stage_table import result_of, trained_kinds, trained_phases

MANY_EPOCHS = 500
"""Epochs above which a warning is printed. Emoji are composed anew each time and may have more."""
MUCH_ENLARGED = 4.0
_MANY_CUT = 0.1  # of the captions
_MOST_ENLARGED = 0.5  # of the images
_LONGEST = 20_000  # characters of a caption that are tokenized


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a phase reads: data set, images, batches and size."""

    stage: str
    """The name of the phase: a, b, b2, ..."""
    data: str
    images: int
    """Length of the phase in images."""
    batch_size: int
    accumulate: int
    size: int
    """Side of the images in pixels. The shorter side of wide and tall images."""
    images_option: str
    """The command-line option that sets ``images``."""
    batch_option: str
    """The command-line option that sets ``batch_size``."""


def readings(recipe: Recipe) -> list[Reading]:
    """What each phase of a run reads, in the order of training. Includes refinements."""
    found: list[Reading] = []
    for named in trained_phases(recipe):
        phase, optimization = named.phase, named.phase.optimization
        own, stage = (f"--{path.replace('_', '-')}" for path in (named.path or named.config, named.config))
        found.append(
            Reading(
                stage=named.name,
                data=phase.data or recipe.data,
                images=optimization.images,
                batch_size=optimization.batch_size,
                accumulate=optimization.accumulate,
                size=phase.image_size or recipe.image_size,
                images_option=f"{own}.optimization.images" if named.path else f"{stage}.refine-images",
                batch_option=f"{own}.optimization.batch-size",
            )
        )
    return found


def overview(
    recipe: Recipe, sources: Mapping[str, Source | PreparedSet], encoder: TextEncoder | None
) -> tuple[list[str], list[str]]:
    """Lines to print about the data sets of a run, and warnings.

    ``encoder`` is the text encoder that reads the captions. None if no stage reads captions.
    """
    lines: list[str] = []
    warnings: list[str] = []
    for data, source in sources.items():
        phases = [reading for reading in readings(recipe) if reading.data == data]
        for number, (name, part) in enumerate(named_parts(data, source)):
            if isinstance(part, StoredImages):
                _stored(name, part, phases, encoder, bool(recipe.caption), lines, warnings)
            elif isinstance(part, PreparedSet):
                _prepared(name, part, lines)
            else:
                note = ", composed anew each time" if isinstance(part, EmojiSource) else ""
                what = "caption" if isinstance(part, CaptionFile) else "image"
                lines.append(f"{name}: {_number(len(part), what)}{note}")
            fraction = 1.0
            if isinstance(source, MixedSource):
                fraction = source.fraction(number)
                lines.append(f"  {100 * fraction:.3g} % of the mixture")
            length = len(part.rows("train")) if isinstance(part, PreparedSet) else len(part)
            for reading in phases:
                shown = dataclasses.replace(reading, data=name, images=round(reading.images * fraction))
                _epochs(recipe, data, shown, length, isinstance(part, EmojiSource), lines, warnings)
    return lines, warnings


def _stored(
    data: str,
    source: StoredImages,
    phases: Sequence[Reading],
    encoder: TextEncoder | None,
    one_caption: bool,
    lines: list[str],
    warnings: list[str],
) -> None:
    lines.append(f"{data}: {_number(len(source), 'image')} to train on")
    if isinstance(source, FolderSource) and source.without_caption:
        count = _number(len(source.without_caption), "image")
        lines.append(f"  skipped: {count} with an empty caption ({source.without_caption[0]!r})")
    if isinstance(source, IndexedSource):
        dropped = source.index.tally.dropped.most_common()
        lines += [f"  left out: {count:,} {reason}" for reason, count in dropped]
    if encoder is not None:
        _captions(data, source, encoder, one_caption, lines, warnings)
    found = sizes(source)
    target = max(reading.size for reading in phases)
    factors = found.enlarged((target, target))
    checked = "" if len(found.found) == len(source) else f" of {len(found.found):,} checked"
    if factors:
        name = max(factors, key=lambda name: factors[name])
        width, height = found.found[name]
        lines.append(
            f"  {_number(len(factors), 'image')}{checked} smaller than {target}x{target} pixels and "
            f"enlarged, up to {factors[name]:.3g} times ({name!r} has {width}x{height})"
        )
        much = sorted(name for name, factor in factors.items() if factor > MUCH_ENLARGED)
        if much:
            warnings.append(
                f"{_number(len(much), 'image')} of {data}{checked} would be enlarged more than "
                f"{MUCH_ENLARGED:g} times, {much[0]!r} the first. The model would learn the blur. Remove them"
            )
        elif len(factors) > _MOST_ENLARGED * len(found.found):
            warnings.append(
                f"most images of {data} are smaller than {target}x{target} pixels and are enlarged. "
                "The model would learn the blur. Use a smaller --image-size, or larger images"
            )
    elif found.found:
        lines.append(f"  all{checked} have at least {target}x{target} pixels")
    if isinstance(source, FolderSource):
        _ignored(data, source, lines, warnings)


def _captions(
    data: str,
    source: StoredImages,
    encoder: TextEncoder,
    one_caption: bool,
    lines: list[str],
    warnings: list[str],
) -> None:
    items = items_at(range(min(MOST, len(source))), len(source), 0)
    texts = [source.options.with_trigger(text) for item in items for text in source.captions(item)]
    # The encoder itself would truncate each text and warn. Count the tokens before that.
    lengths = [len(encoder.tokenizer.encode(text[:_LONGEST]).ids) for text in texts]
    of = "captions" if len(items) == len(source) else f"captions of {len(items):,} checked images"
    line = f"  {len(texts):,} {of} with {min(lengths)} to {max(lengths):,} tokens, "
    line += f"median {median(lengths):g}"
    cut = sum(length > encoder.text_positions for length in lengths)
    if cut:
        line += (
            f". {cut:,} are longer than the text encoder's {encoder.text_positions} tokens and are truncated"
        )
    lines.append(line)
    if len(texts) > 1 and len(set(texts)) == 1 and not one_caption:
        warnings.append(
            f"all captions of {data} are {texts[0][:60]!r}. The model cannot tell apart what differs between "
            "the images. Describe each image, or give --caption if one caption for all is meant"
        )
    if cut > _MANY_CUT * len(lengths):
        warnings.append(
            f"{cut:,} of {len(lengths):,} captions of {data} are truncated to the text "
            f"encoder's {encoder.text_positions} tokens. Use shorter captions"
        )


def _ignored(data: str, source: FolderSource, lines: list[str], warnings: list[str]) -> None:
    found, whole = ignored(source.root)
    if not whole:
        lines.append(
            f"  stopped looking for unused files after {SECONDS:.0f} seconds, before the end of {data}"
        )
    for reason, entries in found.items():
        what = f"{_number(entries.count, 'entry', 'entries')} {reason} ({entries.first!r})"
        lines.append(f"  not used: {what}")
        if not entries.images:
            continue
        link = "link" in reason
        fix = "Copy its images into the folder" if link else "Save them as PNG or JPEG"
        warnings.append(f"{what} of {data} will not be used. {fix}, if you want to train on them")


def _prepared(data: str, source: PreparedSet, lines: list[str]) -> None:
    described = source.description
    held = len(source.rows("heldout"))
    line = f"{data}: {_number(len(source) - held, 'prepared image')} to train on"
    line += f", {source.crops} crops of each" if source.crops > 1 else ""
    lines.append(line + (f", {held:,} held out" if held else ""))
    if described["enlarged"]:
        lines.append(
            f"  {_number(described['enlarged'], 'crop')} enlarged, of images smaller than their size"
        )
    if described["cut_texts"]:
        lines.append(
            f"  {_number(described['cut_texts'], 'caption')} cut, longer than the text encoder reads"
        )
    for reason, count in described["dropped"].items():
        lines.append(f"  {count} dropped during preparation: {reason}")


def _epochs(
    recipe: Recipe,
    data: str,
    reading: Reading,
    length: int,
    composed: bool,
    lines: list[str],
    warnings: list[str],
) -> None:
    """``data`` is the name of the mixture that the data set of ``reading`` is part of."""
    times = reading.images / length
    stage = reading.stage.upper()
    line = f"  Stage {stage}: {_number(reading.images, 'image')}, {_shown(times)} epochs"
    if recipe.prepared_images:
        kept = cached_images(recipe, data, reading.size)
        kept = cached_captions(recipe) if reading.stage == "few" else kept
        line += f", from a cache of {_number(kept, 'image')} composed at the start"
    lines.append(line)
    if times > MANY_EPOCHS and not composed:
        fit = "" if result_of(recipe) else f". --fit-images {length} fits the whole recipe"
        warnings.append(
            f"Stage {stage} would see each of the {length:,} images of {reading.data} {_shown(times)} times. "
            f"The model would memorise them. Give more images, or fewer with {reading.images_option}{fit}"
        )


PREVIEWS = 8
"""Captions of the data in previews, if a recipe has no preview prompts."""


def with_prompts(recipe: Recipe, sources: Mapping[str, Source | PreparedSet]) -> Recipe:
    """The recipe with captions from the last phase's data as preview prompts, if it has none."""
    reading = [kind for kind in trained_kinds(recipe) if kind.reads_captions]
    if recipe.preview_prompts or not reading:
        return recipe
    source = sources[reading[-1].phases(recipe)[-1].phase.data or recipe.data]
    rows = source.rows("train") if isinstance(source, PreparedSet) else range(len(source))
    found: dict[str, None] = {}
    for number in items_at(range(min(PREVIEWS, len(rows))), len(rows), 0):
        row = int(rows[number])
        if isinstance(source, PreparedSet | StoredImages):
            text = source.captions(row)[0]
            found[source.options.with_trigger(text) if isinstance(source, StoredImages) else text] = None
        else:
            with contextlib.suppress(DataError):  # unreadable images
                rng = generator(0, number, "preview prompt")
                found[source.example(row, rng, recipe.image_size).caption] = None
    return dataclasses.replace(recipe, preview_prompts=tuple(found))


def cached_images(recipe: Recipe, data: str, size: int) -> int:
    """Size of the image cache for a data set and image size: no more images than its phases read."""
    used = (reading.images for reading in readings(recipe) if (reading.data, reading.size) == (data, size))
    return min(recipe.prepared_images, max(used))


def cached_captions(recipe: Recipe) -> int:
    """Size of the cache of captions without images: no more than the student of Stage C is trained on."""
    config = recipe.stage_few
    return min(config.trajectories or recipe.prepared_images, config.optimization.images)


def refuse_small(recipe: Recipe, data: str, length: int, whole: bool) -> None:
    """Raises ``UserError`` if a data set of ``length`` images is smaller than a batch of a phase that reads
    it.

    The message names every option to change. With ``whole``, as for prepared sets, all batches must be full.
    """
    if result_of(recipe) and not whole:
        return  # the networks have no batch statistics, so an image may be in a batch twice
    few = [reading for reading in readings(recipe) if reading.data == data and length < reading.batch_size]
    if not few:
        return
    options: dict[str, int] = {}
    for reading in few:
        fits = max(reading.accumulate, 1 << length.bit_length() - 1) if length else reading.batch_size
        options[reading.batch_option] = fits = fits // reading.accumulate * reading.accumulate
        if whole and reading.images % fits:
            options[reading.images_option] = max(reading.images // fits, 1) * fits
    largest = max(reading.batch_size for reading in few)
    fit = "" if result_of(recipe) else f", or fit everything with --fit-images {length}"
    raise UserError(
        f"{data} has {length} images, fewer than a batch of {largest}. The images of a batch must differ. "
        f"Use {' '.join(f'{name} {value}' for name, value in options.items())}, or more images{fit}."
    )


def print_overview(lines: Iterable[str], warnings: Iterable[str]) -> None:
    """Prints the lines, then the warnings."""
    for line in lines:
        print(line)
    for line in warnings:
        print(f"Warning: {line}.")


def _number(count: int, singular: str, plural: str = "") -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _shown(times: float) -> str:
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
