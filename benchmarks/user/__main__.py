"""The command line of the suite `user`."""

import argparse
import os
import pathlib
import signal
import sys

import benchmarks.user
from benchmarks import rows

OUT = rows.RESULTS / "user.jsonl"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.user",
        description=benchmarks.user.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measures, and appends rows")
    run.add_argument("--scenarios", metavar="NAME,NAME")
    run.add_argument("--choices", metavar="NAME,NAME")
    run.add_argument("--budget", type=float, default=1e9, metavar="SECONDS")
    run.add_argument("--each", type=float, default=240, metavar="SECONDS", help="of one choice")
    run.add_argument("--out", type=pathlib.Path, default=OUT, help="file of rows")
    run.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    run.add_argument("--tiny", action="store_true", help="small models, to try the suite")
    run.add_argument("--steps", type=int, default=6)
    run.add_argument("--commit", help="where git cannot tell")
    run.add_argument("--missing", action="store_true", help="skip what has a row already")
    # Those that wait are stopped; those that compile want several cores.
    default = max(1, (os.cpu_count() or 1) * 3 // 8)
    run.add_argument("--processes", type=int, default=default, metavar="N", help="side by side")
    plan = 'of choices that are plans; "{scenario}" and "{choice}" in it are their names'
    run.add_argument("--plan", metavar="FILE", help=plan)
    run.add_argument("--length", type=int, default=0, metavar="TOKENS", help="of one sequence")
    run.add_argument("--limit", type=float, metavar="GIB", help="of the allocator, with --once")
    limit = run.add_mutually_exclusive_group()
    once = "few steps, checked at a shorter length in the same process"
    limit.add_argument("--once", action="store_true", help=once)
    limit.add_argument("--longest", type=float, metavar="GIB", help="the longest sequence in it")
    limit.add_argument("--largest", type=float, metavar="GIB", help="the largest batch in it")
    for name in ("table", "plot"):
        show = commands.add_parser(name)
        show.add_argument("--results", type=pathlib.Path, nargs="+", default=None)
        show.add_argument("--device", help="its name in the rows")
        if name == "plot":
            show.add_argument("--out", type=pathlib.Path, help="folder of pictures")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    if options.command != "run":
        from benchmarks.user import show

        return show.main(options)
    from benchmarks.user import choices, runner
    from benchmarks.user.choices import CHOICES
    from benchmarks.user.scenarios import SCENARIOS, missing

    if options.limit and not options.once:
        raise SystemExit("--limit is of --once; --longest and --largest have one of their own")
    if options.device != "cuda" and (options.longest or options.largest or options.limit):
        raise SystemExit("a limit of memory needs a CUDA device, whose allocator has one")
    asked = (name for name in ("once", "longest", "largest") if getattr(options, name))
    mode = next(asked, "step")
    scenarios = runner.order(options.scenarios, SCENARIOS)
    for name in list(scenarios):
        if lacking := missing(SCENARIOS[name]):
            print(f"{name}: left out, {', '.join(lacking)} is not here")
            scenarios.remove(name)
    base = runner.Job(
        "",
        "",
        options.device,
        options.tiny,
        options.steps,
        mode,
        options.longest or options.largest or options.limit or 0.0,
        options.commit or rows.commit(),
        options.length,
    )
    if options.plan:
        os.environ[choices.PLAN] = os.path.abspath(options.plan)
    known = rows.read(options.out)
    jobs = runner.jobs(scenarios, runner.order(options.choices, CHOICES), base)
    if options.missing:
        there = {(r["scenario"], r["choice"], r["mode"], r.get("limit_gib", 0)) for r in known}
        jobs = [job for job in jobs if (job.scenario, job.choice, mode, job.limit) not in there]
    # Processes that are stopped would outlive this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    left = runner.run(jobs, options.out, known, options.processes, options.budget, options.each)
    if left:
        print("no time for", ", ".join(f"{job.scenario}/{job.choice}" for job in left))
    return None


if __name__ == "__main__":
    main()
