"""Proves that two versions do the same: same_bytes.py OLD_PYTHON NEW_PYTHON [--new-path DIR] [--shared DIR].

Every job (same_bytes_jobs.py) runs in a folder of its own under each interpreter, at the same path. After each of its
steps all files that it wrote (name and sha256), its standard output (as JSON where it is, else as text), its standard
error and its exit code are compared; what differs is listed, and the exit code is 1. OLD_PYTHON has version 0.1.0 and
makes the inputs, with the test models in tests/.

Not compared are times, speeds and the peak memory of whole processes (VOLATILE, MASKED). What a new version changes on
purpose is written down in ALLOWED and REWORDED; an entry that does nothing is reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from same_bytes_jobs import API, Job, Step, all_jobs

HERE = Path(__file__).resolve().parent
STEP_SECONDS = 600

# Pattern of jobs -> places that may differ, as this script names them, an * for anything: "new 2: stdout.tensors[*].x"
# is a key that only the new version has, "changed 1: stderr" any difference.
ALLOWED: dict[str, tuple[str, ...]] = {
    "help": ("changed *: stdout",),  # layers where it said blocks; the metrics of --by are derived from their registry
    "recipes": ("changed 7: stderr",),  # an unknown key: all keys there are, in place of the nearest
    "merge by statistics": ("changed 7: stderr",),  # the metrics in the order of the registry
    "api arrays": ("changed 1: stdout.bad type.*",),  # the nearest types are found as other names are
    "api metrics": ("changed 1: stdout.keep True.*",),  # not a number of experts, in place of one that is out of range
    "api bad_plans": ("changed 1: stdout.json *",),  # errors of plans say where; an unknown key is one
}
# (old words, new words): messages that were rewritten. Everything around them is still compared.
REWORDED: tuple[tuple[str, str], ...] = (
    ("is no multiple of", "is not a multiple of"),
    ("not a JSON file: ", "not JSON: "),
    ("MTP blocks to drop", "MTP layers to drop"),
)

VOLATILE = ("seconds", "peak_memory_bytes of demo")  # keys of JSON, or a key of the JSON of one command
MASKED = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<= in )\d+\.\d+ s\b",
        r"(?<=reading )[\d.]+ \w+/s",
        r"(?<=peak memory of the whole process )[\d.]+ \w+",
        r"(?<=/)gguf-surgery-demo-\w+",
    )
)
PROGRESS = re.compile(r"^\w+: .+ left\n", re.MULTILINE)


@dataclass(frozen=True)
class Side:
    """One version. path: what stands before its installed packages, or None."""

    python: str
    path: str | None = None

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PGS_", "PYTHON"))}
        return kept | {
            "COLUMNS": "120",
            "LC_ALL": "C.UTF-8",
            "PGS_THREADS": "2",
            "MPLBACKEND": "Agg",
            "OMP_WAIT_POLICY": "PASSIVE",
            **({"PYTHONPATH": self.path} if self.path else {}),
        }

    def command(self, step: Step) -> list[str]:
        first, *rest = step.words
        return [self.python, *([str(HERE / "same_bytes_api.py")] if first == API else ["-m", "pygguf_surgery"]), *rest]

    def run(
        self, *words: str, folder: str | Path = "/", timeout: float = STEP_SECONDS
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.python, *words],
            cwd=folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def has(self, module: str) -> bool:
        return not self.run("-c", f"import {module}").returncode

    def version(self) -> tuple[str, str]:
        """(version, folder of the package)."""
        found = self.run("-c", "import pygguf_surgery as p; print(p.__version__, p.__path__[0])")
        if found.returncode:
            raise SystemExit(f"{self.python}: {found.stderr.decode(errors='replace')}")
        version, _, folder = found.stdout.decode().strip().partition(" ")
        return version, folder


@dataclass(frozen=True)
class Result:
    """What a step did. files: path -> sha256 of all files of the job's folder that are not inputs."""

    exit: int
    stdout: str
    stderr: str
    files: dict[str, str]


# --- running --------------------------------------------------------------------------------------------------------


class Digests:
    """sha256 of files, computed again only if they have changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], str] = {}

    def of(self, path: str) -> str:
        found = os.stat(path)
        key = found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
        if key not in self._known:
            with open(path, "rb") as file:
                self._known[key] = hashlib.sha256(file.read()).hexdigest()
        return self._known[key]

    def folder(self, folder: Path) -> dict[str, str]:
        """Of all files below it that are no links; a link that was put there is said to be one."""
        return {
            os.path.relpath(os.path.join(at, name), folder): self.of(os.path.join(at, name))
            for at, _, names in os.walk(folder)
            for name in sorted(names)
            if not os.path.islink(os.path.join(at, name))
        }


def run_job(job: Job, side: Side, inputs: Path, folder: Path) -> list[Result]:
    """Runs the steps in `folder`, which is made, with a link to each input in it."""
    folder.mkdir(parents=True)
    linked = sorted(os.listdir(inputs))
    for name in linked:
        (folder / name).symlink_to(inputs / name)
    (folder / "shards").mkdir()  # where the README splits to
    digests, results = Digests(), []
    for step in job.steps:
        try:
            done = subprocess.run(
                side.command(step),
                cwd=folder,
                env=side.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=STEP_SECONDS,
                check=False,
            )
            code, out, err = done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        except subprocess.TimeoutExpired:
            code, out, err = -1, "", f"more than {STEP_SECONDS} s"
        files = digests.folder(folder)
        files |= {name: "an input is gone" for name in linked if not os.path.lexists(folder / name)}
        results.append(Result(code, out, err, files))
    return results


# --- comparing ------------------------------------------------------------------------------------------------------


def reword(text: str) -> str:
    """The old version's text in the new version's words."""
    for old, new in REWORDED:
        text = text.replace(old, new)
    return text


def mask(text: str) -> str:
    """Without lines of progress, which a slow run prints, and without times."""
    text = PROGRESS.sub("", text)
    for pattern in MASKED:
        text = pattern.sub("#", text)
    return text


def text_difference(place: str, old: str, new: str) -> Iterator[tuple[str, str]]:
    old, new = mask(reword(old)), mask(new)
    if old == new:
        return
    mine, theirs = old.splitlines(), new.splitlines()
    line = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    shown = [repr(lines[line]) if line < len(lines) else "nothing" for lines in (mine, theirs)]
    yield place, f"line {line + 1}: {shown[0]} became {shown[1]}"


def word_difference(place: str, old: str, new: str) -> Iterator[tuple[str, str]]:
    """Of a help text: every word of options and explanations must still be there, whatever the titles between them."""
    words = reword(" ".join(old.split())).split()  # on one line: where it breaks is no matter
    if gone := Counter(words) - Counter(new.split()):
        yield place, f"gone: {' '.join([*gone][:20])}"


def json_difference(place: str, old: Any, new: Any, command: str) -> Iterator[tuple[str, str]]:
    """(place, what differs) of two JSON values, volatile keys aside."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            where = f"{place}.{key}"
            if key in VOLATILE or f"{key} of {command}" in VOLATILE:
                if (key in old) != (key in new):
                    yield where, "in one version only"
            elif key not in new:
                yield where, "is gone"
            elif key not in old:
                yield where, "is new"
            else:
                yield from json_difference(where, old[key], new[key], command)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from json_difference(f"{place}[{i}]", a, b, command)
    elif isinstance(old, str) and isinstance(new, str):
        yield from text_difference(place, old, new)
    elif type(old) is not type(new) or old != new:
        yield place, f"{shorten(old)} became {shorten(new)}"


def shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str) -> Any:
    """JSON, or None. Equal numbers of another kind (1 and 1.0) stay apart."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def differences(job: Job, old: Sequence[Result], new: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """(place, what differs) of all steps."""
    for i, (step, a, b) in enumerate(zip(job.steps, old, new, strict=True), start=1):
        if a.exit != step.exit:
            yield f"{i}: exit", f"{a.exit} in the old version, the job expects {step.exit}: {a.stderr.strip()[-300:]}"
        if a.exit != b.exit:
            yield f"{i}: exit", f"{a.exit} became {b.exit}: {b.stderr.strip()[-300:]}"
        mine, theirs = (parse(a.stdout), parse(b.stdout)) if step.json else (None, None)
        if mine is not None and theirs is not None:
            yield from json_difference(f"{i}: stdout", mine, theirs, step.words[1])
        elif step.json and a.exit == 0:
            yield f"{i}: stdout", f"not JSON: {(b if theirs is None else a).stdout[:100]!r}"
        elif job.help:
            yield from word_difference(f"{i}: stdout", a.stdout, b.stdout)
        else:
            yield from text_difference(f"{i}: stdout", a.stdout, b.stdout)
        yield from text_difference(f"{i}: stderr", a.stderr, b.stderr)
        for name in sorted(a.files.keys() | b.files.keys()):
            if a.files.get(name) != b.files.get(name):
                found = [files[name][:16] if name in files else "not written" for files in (a.files, b.files)]
                yield f"{i}: file {name}", f"{found[0]} became {found[1]}"


def allowance(job: Job, place: str, what: str) -> tuple[str, str] | None:
    """The entry of ALLOWED that covers a difference."""
    for pattern, entries in ALLOWED.items():
        for entry in entries if fnmatchcase(job.name, pattern) else ():
            kind, _, where = entry.partition(" ")
            if (kind == "changed" or what == "is new") and fnmatchcase(place, where.replace("[", "[[]")):
                return pattern, entry
    return None


# --- the whole ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A job under both versions. found: what differs and is not allowed; used: entries of ALLOWED that covered some."""

    job: Job
    found: list[tuple[str, str]]
    used: set[tuple[str, str]]
    outputs: int
    documents: int
    seconds: tuple[float, float]


def compare_job(job: Job, sides: tuple[Side, Side], inputs: Path, work: Path, keep: bool) -> Outcome:
    here = work / re.sub(r"\W+", "-", job.name)
    results, seconds = [], []
    for side, name in zip(sides, ("old", "new"), strict=True):
        start = time.monotonic()
        results.append(run_job(job, side, inputs, here / "run"))  # at one path, so that what names it is equal
        (here / "run").rename(here / name)
        seconds.append(time.monotonic() - start)
    found, used = [], set()
    for place, what in differences(job, *results):
        entry = allowance(job, place, what)
        if entry is None:
            found.append((place, what))
        else:
            used.add(entry)
    if found and keep:
        for name, steps in zip(("old", "new"), results, strict=True):
            for i, result in enumerate(steps, start=1):
                (here / f"{name}-{i}.out").write_text(result.stdout)
                (here / f"{name}-{i}.err").write_text(result.stderr)
    else:
        shutil.rmtree(here)
    outputs = len({(name, sha) for result in results[0] for name, sha in result.files.items()})
    documents = sum(step.json and result.exit == 0 for step, result in zip(job.steps, results[0], strict=True))
    return Outcome(job, found, used, outputs, documents, (seconds[0], seconds[1]))


def make_inputs(old: Side, folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir(parents=True)
    words = [str(HERE / "same_bytes_inputs.py"), str(folder), args.tests, *([args.shared] if args.shared else [])]
    done = old.run(*words, folder=folder)
    if done.returncode:
        raise SystemExit(f"the inputs cannot be made:\n{done.stderr.decode(errors='replace')}")


def row(outcome: Outcome, verbose: bool) -> str:
    job, found = outcome.job, outcome.found
    word = "DIFFERS" if found else "equal"
    line = (
        f"{word:<8} {job.name:<36} {len(job.steps):>3} steps {outcome.outputs:>4} files {outcome.documents:>3} JSON "
        f"{outcome.seconds[0]:>6.1f} s {outcome.seconds[1]:>6.1f} s"
    )
    if outcome.used:
        line += f"  allowed: {', '.join(sorted(entry for _, entry in outcome.used))}"
    shown = found if verbose else found[:6]
    lines = [line, *(f"         {place}: {what}" for place, what in shown)]
    if len(found) > len(shown):
        lines.append(f"         and {len(found) - len(shown)} more (--verbose)")
    return "\n".join(lines)


def choose_jobs(args: argparse.Namespace, sides: tuple[Side, Side]) -> list[Job]:
    jobs = [job for job in all_jobs(Path(args.readme)) if any(fnmatchcase(job.name, p) for p in args.jobs or ["*"])]
    if not jobs:
        raise SystemExit(f"no job is called {' or '.join(args.jobs)}")
    lacking = {
        module: [side.python for side in sides if not side.has(module)]
        for module in sorted({module for job in jobs for module in job.needs})
    }
    for job in jobs:
        for module in job.needs:
            if lacking[module]:
                print(f"skipped  {job.name}: {' and '.join(sorted(set(lacking[module])))} without {module}")
    return [job for job in jobs if not any(lacking[module] for module in job.needs)]


def stale(outcomes: Sequence[Outcome]) -> list[str]:
    used = {entry for outcome in outcomes for entry in outcome.used}
    return [
        f"{pattern}: {entry}"
        for pattern, entries in ALLOWED.items()
        for entry in entries
        if (pattern, entry) not in used
    ]


def compare_all(args: argparse.Namespace, work: Path) -> int:
    sides = Side(args.old), Side(args.new, args.new_path and os.path.abspath(args.new_path))
    for word, side in zip(("old", "new"), sides, strict=True):
        print(f"{word}: {' at '.join(side.version())}")
    if sides[0].version()[1] == sides[1].version()[1]:
        print("these are one and the same: only luck could differ")
    jobs, start = choose_jobs(args, sides), time.monotonic()
    make_inputs(sides[0], work / "inputs", args)
    before = Digests().folder(work / "inputs")
    print(f"made {len(before)} inputs in {time.monotonic() - start:.1f} s", flush=True)
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(args.parallel) as pool:
        running = [pool.submit(compare_job, job, sides, work / "inputs", work, args.folder is not None) for job in jobs]
        for future in running:
            outcomes.append(future.result())
            print(row(outcomes[-1], args.verbose), flush=True)
            if outcomes[-1].found and not args.keep_going:
                pool.shutdown(cancel_futures=True)
                break
    differ = sum(bool(outcome.found) for outcome in outcomes)
    changed = Digests().folder(work / "inputs") != before
    if changed:
        print("DIFFERS  an input was changed")
    if not args.jobs and not differ and (entries := stale(outcomes)):
        print("ALLOWED has entries that allow nothing: " + ", ".join(entries))
    steps = sum(len(outcome.job.steps) for outcome in outcomes)
    print(
        f"{len(outcomes)} of {len(jobs)} jobs, {steps} commands, {sum(o.outputs for o in outcomes)} files, "
        f"{sum(o.documents for o in outcomes)} JSON documents: {differ or 'none'} differ; "
        f"{time.monotonic() - start:.0f} s, old {sum(o.seconds[0] for o in outcomes):.0f} s, "
        f"new {sum(o.seconds[1] for o in outcomes):.0f} s"
    )
    return 1 if differ or changed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("old", metavar="OLD_PYTHON")
    parser.add_argument("new", metavar="NEW_PYTHON")
    parser.add_argument(
        "--new-path", metavar="DIR", help="a folder with the new package, before what NEW_PYTHON has installed"
    )
    parser.add_argument(
        "--shared",
        metavar="DIR",
        help="a folder with models/tiny-qwen3next-bf16.gguf, its importance "
        "matrices and texts; without it the model of `gguf-surgery demo`",
    )
    parser.add_argument(
        "--tests", default=str(HERE.parent / "tests"), metavar="DIR", help="where the test models are made"
    )
    parser.add_argument("--readme", default=str(HERE.parent / "README.md"), metavar="FILE", help="its commands are run")
    parser.add_argument(
        "--jobs", action="append", metavar="PATTERN", help="only these, such as 'api *'; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the jobs")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first job that differs")
    parser.add_argument("--verbose", action="store_true", help="list everything that differs")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="jobs at a time (default 2)")
    parser.add_argument("--folder", metavar="DIR", help="a new folder, in which the inputs and jobs that differ stay")
    args = parser.parse_args()
    args.tests = os.path.abspath(args.tests)
    if args.shared:
        args.shared = os.path.abspath(args.shared)
    if args.list:
        for job in all_jobs(Path(args.readme)):
            print(f"{job.name}: {len(job.steps)} steps")
        return 0
    if args.folder:
        folder = Path(args.folder).resolve()
        folder.mkdir()
        return compare_all(args, folder)
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as temporary:
        return compare_all(args, Path(temporary).resolve())


if __name__ == "__main__":
    sys.exit(main())
