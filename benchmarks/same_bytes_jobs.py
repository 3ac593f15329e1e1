"""The jobs of same_bytes.py: the commands of the README, those of same_bytes_jobs.txt, and those that use Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "gguf-surgery"
API = "api"
# What the README's commands become for a small model: experts, sizes.
SMALLER = (("--keep 256", "--keep 8"), ("22GB", "10MB"), ("45G", "12M"))
# Functions of same_bytes_api.py and its neighbours, and what they need.
PYTHON: dict[str, tuple[str, ...]] = {
    "faces readme reading arrays options metrics repaired padded remapped limits importance bad_plans": (),
    "plans old_plans statistics": ("scipy",),
    "calibrated": ("llama_cpp", "scipy"),
}
# Models of the tests (moe-NAME.gguf, quant-NAME.gguf): cut and merged; all file types; fitted to a size.
CUT = ("qwen3next qwen3moe deepseek2 dots1 gpt_oss llama4 gemma4 granitehybrid deepseek4 grovemoe nvfp4_scales "
       "nemotron mtp grouped fused Q8_0 MXFP4")  # fmt: skip
MERGED = "qwen3moe gpt_oss gemma4 deepseek2 dots1 mtp fused Q8_0 nvfp4_scales nemotron deepseek4 grovemoe llama4"
TYPES = "llama llama_8_experts qwen3moe qwen3next deepseek2 gemma falcon gpt_oss"
FITTED = "llama qwen3next deepseek2"
COMMANDS = "info plan prune merge quantize edit split join verify calibrate repair demo imatrix stats"
SUBCOMMANDS = ("imatrix show", "imatrix merge", "imatrix slice", "imatrix convert", "stats show", "stats merge")


@dataclass(frozen=True)
class Step:
    """words: a command line. exit: the code it ends with under 0.1.0, so that a job cannot pass because both fail."""

    words: tuple[str, ...]
    exit: int = 0

    @property
    def json(self) -> bool:
        return self.words[0] == API or "--json" in self.words


@dataclass(frozen=True)
class Job:
    """Steps in one folder. needs: modules that both interpreters must have. help: its text is compared word by word."""

    name: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...] = ()
    help: bool = False


def step(text: str) -> Step:
    """`gguf-surgery info x`, `api plans`, or with the exit code in front: `4: gguf-surgery ...`."""
    code, colon, rest = text.partition(": ")
    return Step(tuple(shlex.split(rest)), int(code)) if colon and code.isdecimal() else Step(tuple(shlex.split(text)))


def job(name: str, *steps: str, needs: tuple[str, ...] = (), help: bool = False) -> Job:
    return Job(name, tuple(map(step, steps)), needs, help)


def readme_commands(path: Path) -> list[list[str]]:
    """The commands of each block of the README: lines that begin with the program's name, with those they go on in."""
    blocks: list[list[str]] = []
    together = False
    for line in re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")).splitlines():
        if re.match(rf"\s*(\$ )?{PROGRAM} ", line):
            if not together:
                blocks.append([])
            blocks[-1].append(line.strip().removeprefix("$ "))
            together = True
        elif line.strip():
            together = False
    return blocks


def readme(path: Path) -> Iterator[Job]:
    blocks = readme_commands(path)
    if sum(map(len, blocks)) < 10:
        raise SystemExit(f"{path}: where are the commands?")
    for i, block in enumerate(blocks, start=1):
        steps = []
        for command in block:
            for large, small in SMALLER:
                command = command.replace(large, small)
            verb = command.split()[1]
            if verb not in ("info", "plan", "verify"):
                command += " --force"  # some name an output twice
            if verb in ("calibrate", "repair"):
                command += " --ctx 64 --chunks 12 --threads 1"
            steps.append(command)
        yield job(f"readme {i}", *steps, needs=("llama_cpp",) if any(" calibrate " in s for s in steps) else ())


def listed(path: Path) -> Iterator[Job]:
    """Those of a file of "== name (needs modules)" and commands."""
    for section in re.split(r"^== ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        name, _, needs = title.partition(" (needs ")
        yield job(name, *(line for line in lines if line and not line.startswith("#")),
                  needs=tuple(needs.rstrip(")").split()))  # fmt: skip


def from_python() -> Iterator[Job]:
    for names, needs in PYTHON.items():
        for name in names.split():
            yield job(f"api {name}", f"{API} {name}", needs=needs)
    for name in TYPES.split():
        yield job(f"types of {name}", f"{API} types {name}")
    for name in FITTED.split():
        yield job(f"fit {name}", f"{API} fit {name}")
    for name in CUT.split():
        yield job(
            f"architecture {name}",
            f"{API} architecture {name}",
            f"{PROGRAM} info moe-{name}.gguf --json --full",
            f"{PROGRAM} verify half.gguf --against moe-{name}.gguf --json",
            f"{PROGRAM} plan moe-{name}.gguf --ratio 0.5 --json --full",
        )
    for name in MERGED.split():
        yield job(f"merged {name}", f"{API} merged {name}", needs=("scipy",))


def all_jobs(readme_path: Path) -> list[Job]:
    helped = (f"{PROGRAM} {command} --help" for command in (*COMMANDS.split(), *SUBCOMMANDS))
    help = job("help", f"{PROGRAM} --help", *helped, help=True)
    listing = Path(__file__).with_suffix(".txt")
    return [*readme(readme_path), *listed(listing), help, *from_python()]
