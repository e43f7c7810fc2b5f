"""``wuerstchen evaluate``."""

import argparse
import sys
from pathlib import Path

from wuerstchen.cli.options import Parser, add_guidance_options, add_sampling_options, sampling_of
from wuerstchen.errors import UserError


def add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on held-out pictures and composed prompts",
        description="Scores a model on two fixed lists; writes report.json and report.html.",
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="model folder (the model in the package)"
    )
    evaluate.add_argument(
        "--data", type=Path, help="built emoji set (data/emoji, or none where --photos is given alone)"
    )
    evaluate.add_argument(
        "--split", choices=("val", "test", "all"), default="all", help="choose on val; test is for the report"
    )
    evaluate.add_argument(
        "--lists", type=_lists, default=("a", "b"), help="a: held-out pairs, b: composed prompts (a,b)"
    )
    evaluate.add_argument(
        "--limit", type=int, help="the first N of each list and split only, for a quick look"
    )
    evaluate.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="the model before it was stored small, to see what that cost",
    )
    evaluate.add_argument(
        "--photos", type=Path, metavar="DIR", help="also take the photographs in DIR through Stages A and B"
    )
    evaluate.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder of the report (evaluation)"
    )
    evaluate.add_argument(
        "--targets",
        action="store_true",
        help="judge by the targets of the model in the package (always done for that model on whole lists)",
    )
    evaluate.add_argument("--batch-size", type=int, help="pictures drawn at a time (8 on a CPU, 64 on a GPU)")
    add_guidance_options(evaluate)
    add_sampling_options(evaluate)


def _lists(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= {"a", "b"}:
        raise argparse.ArgumentTypeError(f"'{text}' names no lists; write a, b or a,b")
    return names


def _evaluate(options: argparse.Namespace) -> int:
    from wuerstchen.image_files import check_writable

    if options.targets and options.limit is not None:
        raise UserError(
            f"targets cannot be judged on {options.limit} entries: they are for whole lists. "
            "Leave out --limit or --targets"
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
        name="the model in the package" if is_bundled else str(options.model),
    )
    print(summary(report))
    for path in written:
        print(path)
    return 0
