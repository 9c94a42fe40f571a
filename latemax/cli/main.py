"""The ``latemax`` command: its options, and how its errors end."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 after an error that the command explains in one line; 3 if ``latemax index`` left images
        out and the store holds the others; 130 after an interrupt.

    Raises:
        SystemExit: with status 2 after wrong usage, as argparse does.
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names of files hold characters that the terminal's encoding may lack
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
    except KeyboardInterrupt:
        print(f"latemax {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"latemax {args.command}: {error}", file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latemax", description="MaxSim late interaction between query tokens and image patches."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, devices, and which backends work here and why not")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="words that find their patch, ranking and a CLS study on real photos, as pictures in a folder",
        description="Train words that find their patch in real photos, rank photos for crops of them by MaxSim over "
        "ViT patch tokens, and write pictures and index.html to a folder. The first run downloads 90 MB. Later "
        "runs show the words after about half a minute on two cores and end after about a minute.",
    )
    demo.add_argument("--out", metavar="DIR", default="demo_out", help="folder for the pictures (default: %(default)s)")
    demo.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="a model folder or hub name (default: DINOv2 ViT-S/14, downloaded once)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the crops (default: %(default)s)")
    demo.set_defaults(run=_demo)

    index = commands.add_parser(
        "index",
        help="encode images and PDF pages into a store for `latemax search`",
        description="Encode images and pages of PDF files into a store. A second run continues where the first "
        "stopped, skips the images that the store holds and encodes changed images again. Missing and unreadable "
        "images are named and left out. A ViT-S takes about a tenth of a second per image on a CPU core. A "
        "retriever of billions of parameters takes seconds to minutes, so use --device cuda. After the first batch the "
        "remaining time is printed. Exit status: 0 if all images are in the store, 3 if some were left out, 1 if all "
        "were or after another error.",
    )
    index.add_argument("images", metavar="IMAGES", nargs="+", help="image and PDF files, or folders of them")
    index.add_argument("--model", metavar="NAME_OR_PATH", required=True, help="a model folder or hub name")
    index.add_argument("-o", "--out", metavar="STORE", required=True, help="the store's folder; created if missing")
    index.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="dtype of the stored tokens (default: %(default)s)",
    )
    index.add_argument(
        "--codes", choices=("int8",), help="also store 8-bit codes, from which search finds the same images faster"
    )
    index.add_argument("--size", type=int, help="image size in pixels (default: the model's own)")
    index.add_argument("--batch-size", type=_positive, default=16, help="images per batch (default: %(default)s)")
    index.add_argument("--device", help="device of the encoder (default: cpu)")
    index.add_argument("--adapter", metavar="FILE", help="a LoRA file for the model")
    index.add_argument("--prune", action="store_true", help="also remove images of IMAGES whose files are gone")
    index.add_argument("--json", action="store_true", help="print the summary as JSON")
    index.set_defaults(run=_index)

    search = commands.add_parser(
        "search",
        help="the best images of a store for a text, a crop or query tokens",
        description="Rank the images of a store, exactly. --text and --image load the model that the store was "
        "indexed with. A frozen ViT such as DINOv2 finds the same object or texture, not a meaning: in `latemax demo`, "
        "45 of 63 random crops rank their own photo first among 21 (chance: 3 of 63).",
    )
    search.add_argument("store", metavar="STORE", help="the store's folder")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", metavar="WORDS", help="a text, encoded with the store's own model")
    query.add_argument(
        "--image", metavar="CROP", help="an image, or report.pdf#page=3, encoded with the store's own model"
    )
    query.add_argument("--tokens", metavar="FILE", help=".npy, .safetensors or .pt with [l_q, dim] or [n_q, l_q, dim]")
    search.add_argument("-k", type=_positive, default=10, metavar="N", help="number of results (default: %(default)s)")
    search.add_argument("--size", type=int, help="size of the crop in pixels (default: that of the store's images)")
    search.add_argument(
        "--where", metavar="CONDITION", help="search only images that meet it, such as \"id LIKE '%%cat%%'\""
    )
    search.add_argument("--patches", action="store_true", help="also print the patches that each score comes from")
    search.add_argument("--html", metavar="FILE", help="write a page of the results with each word's best patch")
    search.add_argument("--normalize", action="store_true", help="L2-normalize all tokens before scoring")
    search.add_argument(
        "--memory", type=_positive, default=1024, metavar="MIB", help="MiB of read buffers (default: %(default)s)"
    )
    search.add_argument("--device", help="device that scores (default: cpu)")
    search.add_argument("--verify", action="store_true", help="check every byte of the store first")
    search.add_argument("--json", action="store_true", help="print the results as JSON")
    search.set_defaults(run=_search)

    evaluate = commands.add_parser(
        "evaluate",
        help="what codes and first stages keep of a store's exact ranking; nDCG, recall and MRR",
        description="Measure how much of the exact ranking 8-bit codes and first stages keep, with and without exact "
        "rescoring, and their bytes and milliseconds. Every query is also searched exactly, and first stages are built "
        "from the whole store in memory. Images as queries load the model that the store was indexed with. --qrels "
        "adds nDCG, recall and MRR and needs ir-measures.",
    )
    evaluate.add_argument("store", metavar="STORE", help="the store's folder")
    evaluate.add_argument(
        "--queries", metavar="FILE", nargs="+", required=True,
        help="files of query tokens (.npy, .safetensors, .pt), or images, encoded with the store's own model",
    )  # fmt: skip
    evaluate.add_argument(
        "--qrels", metavar="FILE",
        help="judgements, 'query 0 document relevance' a line; queries are named after their files, FILE#0 …",
    )  # fmt: skip
    evaluate.add_argument(
        "--stages", nargs="+", choices=("binary", "mean", "row", "muvera", "lemur"), default=("binary", "mean"),
        help="first stages (default: binary mean)",
    )  # fmt: skip
    evaluate.add_argument(
        "-k", type=_positive, default=10, metavar="N", help="results that count (default: %(default)s)"
    )
    evaluate.add_argument(
        "--candidates",
        type=_positive,
        default=50,
        metavar="N",
        help="candidates of a first stage (default: %(default)s)",
    )
    evaluate.add_argument("--normalize", action="store_true", help="L2-normalize all tokens before scoring")
    evaluate.add_argument(
        "--memory", type=_positive, default=1024, metavar="MIB", help="MiB of read buffers (default: %(default)s)"
    )
    evaluate.add_argument("--device", help="device of the encoder (default: cpu)")
    evaluate.add_argument("--plot", metavar="FILE", help="write a plot of quality against bytes")
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON")
    evaluate.set_defaults(run=_evaluate)

    store = commands.add_parser("store", help="describe, check, clean or upgrade a store")
    store.add_argument("store", metavar="STORE", help="the store's folder")
    actions = store.add_subparsers(dest="action", metavar="ACTION", required=True)
    action = actions.add_parser("info", help="what the store holds")
    action.add_argument("--json", action="store_true", help="print it as JSON")
    actions.add_parser("verify", help="check every byte")
    action = actions.add_parser("remove", help="remove documents")
    action.add_argument("ids", metavar="ID", nargs="+", help="ids as `latemax search` prints them")
    actions.add_parser("compact", help="give back the disk space of removed documents and join small shards")
    actions.add_parser("upgrade", help="convert a store of the old format")
    store.set_defaults(run=_store)

    bench = commands.add_parser("bench", help="a quick table for this machine, compared with the machine's own limit")
    bench.add_argument("--json", action="store_true", help="print it as JSON")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _info(args: argparse.Namespace) -> None:
    from latemax.cli.info import collect, render

    info = collect()
    print(json.dumps(info, indent=2) if args.json else render(info))


def _bench(args: argparse.Namespace) -> None:
    from latemax.cli.bench import quick, render

    rows = quick()
    print(json.dumps(rows, indent=2) if args.json else render(rows))


def _index(args: argparse.Namespace) -> int:
    from latemax.cli.index import index, render

    done = index(
        args.images, model=args.model, store=args.out, dtype=args.dtype, size=args.size, batch_size=args.batch_size,
        device=args.device, adapter=args.adapter, prune=args.prune, codes=args.codes,
    )  # fmt: skip
    print(json.dumps(done, indent=2) if args.json else render(done))
    if not done["left_out"]:
        return 0
    return 3 if done["indexed"] + done["replaced"] + done["already"] else 1


def _search(args: argparse.Namespace) -> None:
    from latemax.cli.search import render, search

    found = search(
        args.store, text=args.text, image=args.image, tokens=args.tokens, k=args.k, size=args.size, where=args.where,
        patches=args.patches, html=args.html, normalize=args.normalize, memory_mib=args.memory, device=args.device,
        verify=args.verify,
    )  # fmt: skip
    print(json.dumps(found, indent=2) if args.json else render(found))


def _evaluate(args: argparse.Namespace) -> None:
    from latemax.cli.evaluate import evaluate, render

    found = evaluate(
        args.store, queries=args.queries, k=args.k, candidates=args.candidates, normalize=args.normalize,
        memory_mib=args.memory, device=args.device, plot=args.plot, qrels=args.qrels, stages=args.stages,
    )  # fmt: skip
    print(json.dumps(found, indent=2) if args.json else render(found))


def _store(args: argparse.Namespace) -> None:
    from latemax.cli import store

    if args.action == "info":
        found = store.info(args.store)
        print(json.dumps(found, indent=2) if args.json else store.render_info(found))
    elif args.action == "remove":
        print(store.remove(args.store, args.ids))
    else:
        act = {"verify": store.verify, "compact": store.compact, "upgrade": store.upgraded}[args.action]
        print(act(args.store))


def _demo(args: argparse.Namespace) -> None:
    from latemax.demo import run

    run(args.out, model=args.model, seed=args.seed)
