"""The command line: python -m compendium VERB, or compendium VERB. A verb imports what it needs when it is called."""

import argparse
import sys
from pathlib import Path

VERBS = {  # verb -> what it does, an example
    "data": ("Fetch raw data sets, and verify them.", "compendium data cifar10 svhn"),
    "train": (
        "Train losses of a study on the same batches, outside the pipeline (which may delete them: publish them).",
        "compendium train cifar10-resnet50 cross_entropy focal3 --seed 0",
    ),
    "assess": (
        "Tables and figures for models from elsewhere: logits in, chapters 3, 7, 8, 10, 11 and 15 out.",
        "compendium assess mine vit.npz forest.npz",
    ),
    "publish": (
        "Pack finished runs into one file, or publish packed ones in this repository.",
        "compendium publish pack cifar10-resnet50",
    ),
    "verify": (
        "Train a published run again, for minutes to hours (docs/verify.md), and compare every number.",
        "compendium verify fashion-4500 focal3 1",
    ),
    "grid": (
        "Run many stages at once: on the cores or GPUs of this machine, or on a Slurm cluster.",
        "compendium grid run --executor slurm",
    ),
    "bench": ("Measure how fast this machine trains and measures, beside stock loops.", "compendium bench"),
    "notebook": (
        "Execute a notebook as a stage does, or strip or fill a folder of them.",
        "compendium notebook notebooks/08_results.ipynb out.ipynb -p study fashion",
    ),
    "report": ("Build the static site from what results or artifacts left.", "compendium report site"),
}


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments; nothing heavy is imported for it."""
    top = argparse.ArgumentParser(prog="compendium", description="What runs the focalcal compendium.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {}
    for verb, (description, example) in VERBS.items():
        epilog = f"example: {example}"
        made[verb] = verbs.add_parser(verb, help=description, description=description, epilog=epilog)

    made["data"].add_argument(
        "name", nargs="*", help="data sets; by default what the active studies use, and Fashion-MNIST"
    )
    made["data"].add_argument("--prepare", metavar="STUDY", help="instead, write artifacts/STUDY/prepared.npz")

    made["train"].add_argument("study", help="its name under studies in params.yaml")
    made["train"].add_argument("loss", nargs="+", help="names under shared.losses in params.yaml")
    made["train"].add_argument(
        "--seed", type=int, default=0, help="of the network's first weights and the order of samples"
    )

    made["assess"].add_argument("study", help="a new name for these models together")
    made["assess"].add_argument("file", nargs="+", type=Path, help="MODEL.npz with val_logits, val_labels and test_...")

    commands = made["publish"].add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="on the machine that trained: write STUDY.tar")
    packing.add_argument("study")
    packing.add_argument("--out", type=Path, help="instead of STUDY.tar")
    packing.add_argument("--weights", action="store_true", help="with the networks' weights")
    packing.add_argument("--scores-only", action="store_true", help="without what only chapters 5 and 9 read; smaller")
    adding = commands.add_parser("add", help="here: into published/STUDY, pinned by published/STUDY.dvc")
    adding.add_argument("file", nargs="+", type=Path)

    made["verify"].add_argument("study", help="a file of published/, without .dvc")
    made["verify"].add_argument("loss", help="a name under shared.losses in params.yaml")
    made["verify"].add_argument("seed", type=int)

    commands = made["grid"].add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run all matching stages that are not up to date")
    run.add_argument("glob", nargs="*", default=["train@*"], help="names of stages, with * and ? (default: train@*)")
    run.add_argument("--executor", choices=("local", "slurm"), default="local")
    many = "how many at a time (default: here one a GPU or CPU thread, on Slurm all that it lets run)"
    run.add_argument("--jobs", type=int, metavar="N", help=many)
    run.add_argument("--cluster", type=Path, metavar="FILE", help="what to ask Slurm for (default: slurm.yaml)")
    status = commands.add_parser("status", help="how far a grid is, and where its logs are")
    status.add_argument("--wait", action="store_true", help="follow it to its end, and collect its results")
    for command in (status, commands.add_parser("cancel", help="stop a grid")):
        command.add_argument("grid", nargs="?", help="its name (default: the newest)")

    made["bench"].add_argument("--networks", nargs="+", help="names in focalcal.networks (default: two that fit)")

    made["notebook"].add_argument("notebook", type=Path)
    made["notebook"].add_argument("out", type=Path)
    made["notebook"].add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter"
    )
    folders = made["notebook"].add_mutually_exclusive_group()
    folders.add_argument("--strip", action="store_true", help="strip the notebooks of a folder into another")
    folders.add_argument("--fill", action="store_true", help="put outputs from artifacts into a folder")

    made["report"].add_argument("out", nargs="?", type=Path, help="a folder (default: site)")
    return top


def call(given: argparse.Namespace) -> int | None:
    """Do what a command line asks for; the exit status, where that is not 0."""
    if given.verb == "data" and given.prepare:
        if given.name:
            raise ValueError("--prepare writes what a study needs; give no data sets beside it.")
        from compendium import prepare

        prepare.write_prepared(given.prepare)
    elif given.verb == "data":
        from compendium import fetch

        fetch.fetch_all(given.name)
    elif given.verb == "train":
        from compendium import checkpoints, paths, trainings

        if len(set(given.loss)) < len(given.loss):
            raise ValueError(f"Every loss is trained once; one of {' '.join(given.loss)} is named twice.")
        for run in (paths.published(given.study, loss, given.seed) for loss in given.loss):
            if run.is_dir():
                raise ValueError(
                    f"{run} is published; `compendium verify` trains it again and leaves everything as it is."
                )
        for loss in given.loss:
            run = paths.run(given.study, loss, given.seed)
            under_way = checkpoints.place(given.study, loss, given.seed).glob("*/[0-9]*.safetensors")
            if (run / "logits.npz").is_file() and not any(under_way):  # else perhaps killed while saving
                raise ValueError(f"{run} is finished; delete it to train it again.")
        trainings.train_jobs(given.study, given.loss, given.seed)
    elif given.verb == "assess":
        from compendium import assess

        assess.assess(given.study, given.file)
    elif given.verb == "publish":
        from compendium import publish

        if given.command == "pack":
            publish.pack(given.study, given.out, given.weights, given.scores_only)
        else:
            publish.publish(given.file)
    elif given.verb == "verify":
        from compendium import verify

        return verify.verify(given.study, given.loss, given.seed)
    elif given.verb == "grid":
        from compendium import grid

        return grid.call(given)
    elif given.verb == "bench":
        from compendium import bench

        bench.bench(given.networks)
    elif given.verb == "notebook":
        from compendium import notebook

        if given.p and (given.strip or given.fill):
            raise ValueError("-p goes with executing a notebook; --strip and --fill take two folders only.")
        if given.strip:
            notebook.strip(given.notebook, given.out)
        elif given.fill:
            notebook.fill(given.notebook, given.out)
        else:
            notebook.execute(given.notebook, given.out, dict(given.p))
    else:
        import runpy

        from compendium import paths

        runpy.run_path(str(paths.root() / "report" / "build.py"))["build"](given.out or paths.root() / "site")
    return None


def main(arguments=None) -> int | None:
    """Run a command line; errors that people can mend end in one sentence and exit status 1."""
    given = parser().parse_args(arguments)
    try:
        return call(given)
    except KeyboardInterrupt:
        goes_on = " A training that is started again goes on from its last finished epoch."
        print(f"\nStopped.{'' if given.verb == 'verify' else goes_on}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as problem:
        extras = "compendium,report" if given.verb == "report" else "compendium"
        sys.exit(f"focalcal: '{problem.name}' is missing; install what this needs with: pip install '.[{extras}]'")
    except (ValueError, RuntimeError, OSError, FloatingPointError) as problem:
        sys.exit(f"focalcal: {problem}")


if __name__ == "__main__":
    sys.exit(main())
