"""``wuerstchen evaluate``."""

import argparse
import sys
from pathlib import Path

from wuerstchen.cli.options import Parser, add_guidance_options, add_sampling_options, sampling_of
from wuerstchen.errors import UserError


def add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on held-out images and composed prompts",
        description="Scores a model on two fixed lists. Writes report.json and report.html.",
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="model folder (default: the bundled model)"
    )
    evaluate.add_argument(
        "--data", type=Path, help="emoji data set (default: data/emoji, or none if only --photos is given)"
    )
    evaluate.add_argument(
        "--split",
        choices=("val", "test", "all"),
        default="all",
        help="part of the data set: use val to select a model, and test only to report (default: all)",
    )
    evaluate.add_argument(
        "--lists",
        type=_lists,
        default=("a", "b"),
        help="a: held-out image-text pairs, b: composed prompts (default: a,b)",
    )
    evaluate.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="score only the first N entries of each list and split, for a quick check",
    )
    evaluate.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="the same model in float32, to measure the quality that smaller weights lose",
    )
    evaluate.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="also reconstruct the photographs in DIR with Stages A and B",
    )
    evaluate.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder for the report (default: evaluation)"
    )
    evaluate.add_argument(
        "--targets",
        action="store_true",
        help="check the scores against the targets of the bundled model (always on for that model without "
        "--limit)",
    )
    evaluate.add_argument(
        "--batch-size", type=int, help="images per batch (default: 8 on a CPU, 64 on a GPU)"
    )
    add_guidance_options(evaluate)
    add_sampling_options(evaluate)


def _lists(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= {"a", "b"}:
        raise argparse.ArgumentTypeError(f"unknown list in '{text}'. Use a, b or a,b.")
    return names


def _evaluate(options: argparse.Namespace) -> int:
    from wuerstchen.image_files import check_writable

    if options.targets and options.limit is not None:
        raise UserError(
            f"targets cannot be checked on {options.limit} entries. They only hold for the full lists. Omit "
            "--limit or --targets."
        )
    check_writable(options.out)
    sampling = sampling_of(options)

    from wuerstchen.checkpoints.hub import local_folder
    from wuerstchen.evaluate.page import write_report
    from wuerstchen.evaluate.report import evaluate, summary
    from wuerstchen.pipeline import BUNDLED, load

    folder = local_folder(options.model or BUNDLED)
    before = None if options.before is None else local_folder(options.before)
    is_bundled = folder.resolve() == BUNDLED.resolve()
    data = options.data
    if data is None and options.photos is None:
        data = Path("data/emoji")
    report = evaluate(
        load(folder, options.device, precision="float32"),
        data,
        lists=options.lists,
        splits=("val", "test") if options.split == "all" else (options.split,),
        limit=options.limit,
        sampling=sampling,
        before=None if before is None else load(before, options.device, precision="float32"),
        photos=options.photos,
        batch_size=options.batch_size,
        against_targets=options.targets or (is_bundled and options.limit is None),
        announce=lambda line: print(line, file=sys.stderr),
    )
    written = write_report(
        report,
        options.out,
        model=folder,
        before=before,
        name="the bundled model" if is_bundled else str(options.model),
    )
    print(summary(report))
    for path in written:
        print(path)
    return 0
