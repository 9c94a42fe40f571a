"""The `latemax` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (the process's own if None).

    Returns the exit status: 0, or 1 for an error it explains. Wrong usage exits with 2, as argparse does.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"latemax {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latemax", description="MaxSim late interaction between query tokens and image patches."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, devices, and which backends work here and why not")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="real photos through a real ViT: ranking, grounding and CLS study, pictures to a folder",
        description="Rank real photos for crops of them by MaxSim over ViT patch tokens; writes pictures to a folder.",
    )
    demo.add_argument("--out", metavar="DIR", default="demo_out", help="folder for the pictures (default: %(default)s)")
    demo.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a model folder or hub name (default: DINOv2 ViT-S/14, fetched once)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the crops (default: %(default)s)")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="the quick table for this machine, with the limit that binds")
    bench.add_argument("--json", action="store_true", help="the same as JSON")
    bench.set_defaults(run=_bench)
    return parser


def _info(args: argparse.Namespace) -> None:
    import json

    from latemax._info import collect, render

    info = collect()
    print(json.dumps(info, indent=2) if args.json else render(info))


def _bench(args: argparse.Namespace) -> None:
    import json

    from latemax._bench import quick, render

    rows = quick()
    print(json.dumps(rows, indent=2) if args.json else render(rows))


def _demo(args: argparse.Namespace) -> None:
    from latemax.demo import run

    run(args.out, model=args.model, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
