"""The kernels on aarch64, cross-compiled and run under qemu-user, give x86's bytes."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from support import golden, kernel_data
from support.kernels import CASES, DECODED, TYPES, defined, encode, outcome, with_kernels
from support.places import ROOT

GGML = ROOT / "third_party" / "ggml" / "source"
TOOLS = ["aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64-static"]
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
QUIET = ["-Dprintf=pgs_quiet_printf", "-Dfprintf=pgs_quiet_fprintf", "-Dqsort=pgs_qsort"]

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(
        not (GGML / "src" / "ggml.c").exists(), reason="ggml's source is fetched by a build in the checkout"
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """As CMakeLists.txt compiles them, statically linked."""
    folder = tmp_path_factory.mktemp("neon")
    version = (GGML / "src" / "ggml-version.h.in").read_text()
    (folder / "ggml-version.h").write_text(version.replace("@GGML_VERSION@", "0").replace("@GGML_BUILD_COMMIT@", "0"))
    common = [
        "-O2",
        "-ffp-contract=off",
        "-w",
        "-c",
        "-ffunction-sections",
        "-fdata-sections",
        f"-I{ROOT}/csrc",
        f"-I{GGML}/include",
        f"-I{GGML}/src",
        f"-I{folder}",
    ]
    c = ["aarch64-linux-gnu-gcc", *common, "-O3", "-fexceptions", "-D_GNU_SOURCE", "-DNDEBUG", *QUIET]
    cpp = ["aarch64-linux-gnu-g++", "-std=c++20", *common]
    lanes = sorted((ROOT / "csrc/quant/lanes").glob("*.cpp"))
    jobs = [[*c, GGML / "src/ggml.c"], [*c, ROOT / "csrc/quant/ggml_grids.c"], [*cpp, GGML / "src/ggml-threading.cpp"]]
    jobs += [
        [*cpp, ROOT / "csrc" / name]
        for name in (
            "base/error.cpp",
            "base/parallel.cpp",
            "quant/types.cpp",
            "quant/grids.cpp",
            "quant/rows.cpp",
            "quant/dispatch.cpp",
        )
    ] + [[*cpp, Path(__file__).with_name("encode_driver.cpp")]]
    for name, width in (("neon", 4), ("scalar", 1)):
        jobs += [[*cpp, "-O3", "-fwrapv", f"-DPGS_SET={name}", f"-DPGS_WIDTH={width}", path] for path in lanes]
    objects = [str(folder / f"{i}.o") for i in range(len(jobs))]
    for job, out in zip(jobs, objects, strict=True):
        subprocess.run([*map(str, job), "-o", out], check=True)
    path = folder / "driver"
    subprocess.run(["aarch64-linux-gnu-g++", "-static", "-Wl,--gc-sections", *objects, "-o", path], check=True)
    return path


ENCODE, BEST, DECODE = range(3)


def run(driver, kernels, cases):
    """The answers to (type, what to do, rows, importance or None)."""
    question = b""
    for name, todo, x, w in cases:
        rows, k = x.shape
        if todo == DECODE:
            k = k // TYPES[name].block_bytes * TYPES[name].block
        question += struct.pack("<iiQQQ", TYPES[name].id, todo, rows, k, w is not None) + x.tobytes()
        question += b"" if w is None else w.tobytes()
    result = subprocess.run(
        ["qemu-aarch64-static", driver],
        input=question,
        capture_output=True,
        check=True,
        env={**os.environ, "PGS_KERNELS": kernels},
    )
    assert result.stderr.decode().strip() == kernels
    answers, at = [], 0
    for _ in cases:
        (n,) = struct.unpack_from("<Q", result.stdout, at)
        answers.append(result.stdout[at + 8 : at + 8 + n])
        at += 8 + n
    assert at == len(result.stdout)
    return answers


@pytest.mark.parametrize("kernels", ["neon", "scalar"])
@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_bytes_are_those_of_x86(driver, name, weighted, kernels):
    block, cases, expected = TYPES[name].block, [], []
    shapes = [(1, block), (37, block), (5, 3 * block), (64, 8 * block)] + [(128, 2048)] * (
        2 if kernels == "neon" else 0
    )
    for seed, (rows, k) in enumerate(shapes):
        for kind in ("ordinary", "strange", "huge", "tiny"):
            x = defined(name, getattr(kernel_data, kind)(rows, k, seed))
            w = kernel_data.importance(k, seed, seed % 3)[None] if weighted else None
            cases.append((name, ENCODE, x, w))
            answer = with_kernels("ggml", lambda: outcome(lambda: encode(name, x, w)))
            expected.append(answer if isinstance(answer, bytes) else b"")
    assert run(driver, kernels, cases) == expected


def test_the_best_encoder_too(driver):
    x = np.concatenate([getattr(kernel_data, kind)(300, 96, 3) for kind in ("ordinary", "strange", "tiny")])
    w = kernel_data.importance(96, 3, 1)[None]
    for weights in (None, w):
        expected = outcome(lambda: encode("MXFP4", x, weights, best=True))
        (found,) = run(driver, "neon", [("MXFP4", BEST, x, weights)])
        assert found == (expected if isinstance(expected, bytes) else b"")


@pytest.mark.parametrize("kernels", ["neon", "scalar"])
def test_golden_bytes_and_numbers(driver, kernels):
    """Among them all decoders, and where the bytes are those of ggml by gcc on x86 only."""
    cases, expected = [], {}
    for name, weighted in CASES:
        for kind in golden.kinds(name):
            x, w = golden.rows(kind, TYPES[name].block)
            cases.append((name, ENCODE, x, w if weighted else None))
            case = f"{name} {'imatrix' if weighted else '-'} {kind}"
            expected[case] = golden.golden()[case]
    for name in DECODED:
        cases.append((name, DECODE, golden.to_decode(name), None))
        case = f"{name} decode"
        expected[case] = golden.golden()[case]
    answers = run(driver, kernels, cases)
    assert dict(zip(expected, map(golden.sha256, answers), strict=True)) == expected


@pytest.mark.parametrize("kernels", ["neon", "scalar"])
@pytest.mark.parametrize("name", DECODED)
def test_numbers_of_any_count(driver, name, kernels):
    data, size = golden.to_decode(name)[:1], TYPES[name].block_bytes
    expected = np.frombuffer(run(driver, "scalar", [(name, DECODE, data, None)])[0], np.uint32)
    for blocks in (1, 3, 9, 17):
        (found,) = run(driver, kernels, [(name, DECODE, np.ascontiguousarray(data[:, : blocks * size]), None)])
        assert np.array_equal(np.frombuffer(found, np.uint32), expected[: blocks * TYPES[name].block])
