"""Shards: llama-gguf-split's partition, keys and names; joined again, the same file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import Value
from pygguf_surgery.edits.split import MAX_SHARDS, partition, shard_metadata, shard_paths
from pygguf_surgery.plan_data.edits import Split
from support import moe_models
from support.gguf_bytes import header, info, kv, pad
from support.gguf_files import make_gguf

# --- the partition --------------------------------------------------------------------------------------------------


def gguf_split(nbytes, *, max_bytes=None, max_tensors=None, first_empty=False, strict=True):
    """llama-gguf-split's loop (tools/gguf-split/gguf-split.cpp, split_strategy). A shard would be empty where the first
    tensor is too large: it gives up (None), without `strict` the tensor is put there."""
    shards, current, size = [[]] if first_empty else [], [], 0
    for i, n in enumerate(nbytes):
        n = (n + 31) & ~31
        if size + n > max_bytes if max_bytes is not None else i > 0 and i % max_tensors == 0:
            if not current and strict:
                return None
            if current:
                shards.append(current)
            current, size = [], n
        else:
            size += n
        current.append(i)
    return [*shards, current]


sizes = st.lists(st.integers(0, 400), max_size=40)


@given(sizes, st.integers(1, 1000), st.booleans())
@example([10, 50], 32, False)  # the first alone is small enough, the second never
def test_by_size_as_llama_gguf_split(nbytes, most, first_empty):
    ours = partition(Split(max_bytes=most, first_empty=first_empty), nbytes, [0] * len(nbytes), 32)
    theirs = gguf_split(nbytes, max_bytes=most, first_empty=first_empty)
    assert not ours.blockers and not ours.single
    assert ours.shards == (theirs or gguf_split(nbytes, max_bytes=most, first_empty=first_empty, strict=False))
    assert [i for shard in ours.shards for i in shard] == list(range(len(nbytes)))
    assert bool(ours.warnings) == any((n + 31) // 32 * 32 > most for n in nbytes)


@given(sizes, st.integers(1, 50), st.booleans())
def test_by_number_as_llama_gguf_split(nbytes, most, first_empty):
    ours = partition(Split(max_tensors=most, first_empty=first_empty), nbytes, [0] * len(nbytes), 32)
    assert ours.shards == gguf_split(nbytes, max_tensors=most, first_empty=first_empty)
    assert not ours.blockers and not ours.warnings and not ours.single


def test_without_a_limit_128_tensors():
    assert [len(s) for s in partition(Split(), [1] * 300, [0] * 300, 32).shards] == [128, 128, 44]


def test_a_tensor_larger_than_a_shard_is_alone_and_named():
    found = partition(Split(max_bytes=100), [10, 5000, 10, 10], [0] * 4, 32, names=["a", "big", "c", "d"])
    assert found.shards == [[0], [1], [2, 3]]
    assert len(found.warnings) == 1 and found.warnings[0].startswith("big alone has ")


def test_padding_counts():
    assert partition(Split(max_bytes=64), [1, 1, 1], [0] * 3, 32).shards == [[0, 1], [2]]
    assert partition(Split(max_bytes=64), [1, 1, 1], [0] * 3, 64).shards == [[0], [1], [2]]


@pytest.mark.parametrize(
    "split, object",
    [
        (Split(max_bytes=1, max_tensors=1), "split"),
        (Split(keep=True, max_bytes=1), "split"),
        (Split(keep=True, max_tensors=1), "split"),
        (Split(keep=True, first_empty=True), "split"),
        (Split(max_bytes=0), "max_bytes"),
        (Split(max_tensors=0), "max_tensors"),
        (Split(max_tensors=-3), "max_tensors"),
    ],
)
def test_what_contradicts_itself(split, object):
    found = partition(split, [1, 2], [0, 0], 32)
    assert [b.object for b in found.blockers] == [object] and found.shards == [[0, 1]]


def test_more_shards_than_a_u16_counts():
    n = MAX_SHARDS + 1
    assert partition(Split(max_tensors=1), [0] * n, [0] * n, 32).blockers[0].found == n
    assert not partition(Split(max_tensors=1), [0] * (n - 1), [0] * (n - 1), 32).blockers
    assert partition(Split(max_tensors=1, first_empty=True), [0] * (n - 1), [0] * (n - 1), 32).blockers


def test_keep_is_the_shard_of_the_source():
    found = partition(Split(keep=True), [1] * 5, [0, 1, 1, 3, 3], 32, source_count=4)
    assert found.shards == [[0], [1, 2], [3, 4]] and not found.single  # nothing is left of shard 2
    assert partition(Split(keep=True), [1] * 2, [1, 2], 32, source_count=3).shards == [[], [0], [1]]  # the metadata
    assert partition(Split(keep=True), [1] * 2, [0, 0], 32).single


# --- keys and names -------------------------------------------------------------------------------------------------


def test_the_first_shard_has_all_metadata_and_the_others_three_keys():
    metadata = {"general.architecture": Value("llama", "str"), "split.count": Value(9, "u16"), "a.b": Value(1, "u32")}
    split = [("split.no", "u16", 0), ("split.tensors.count", "i32", 77), ("split.count", "u16", 3)]
    first = shard_metadata(metadata, 0, 3, 77, 32)
    assert list(first) == ["general.architecture", "a.b", *(k for k, _, _ in split)]
    assert [(k, first[k].type, first[k].value) for k, _, _ in split] == split
    other = shard_metadata(metadata, 2, 3, 77, 32)
    assert {k: v.value for k, v in other.items()} == {"split.no": 2, "split.tensors.count": 77, "split.count": 3}
    assert list(shard_metadata(metadata, 1, 3, 77, 64)) == ["general.alignment", *(k for k, _, _ in split)]


@pytest.mark.parametrize(
    "path, prefix",
    [
        ("a/m.gguf", "a/m"),
        ("m", "m"),
        ("m.gguf.bin", "m.gguf.bin"),
        ("a-00001/m", "a-00001/m"),
        ("m-1-of-2.gguf", "m-1-of-2"),
    ],
)
def test_names(path, prefix):
    assert shard_paths(path, 2) == [f"{prefix}-00001-of-00002.gguf", f"{prefix}-00002-of-00002.gguf"]


@pytest.mark.parametrize("path", ["x-00001-of-00003.gguf", "d/x-00001-of-00003", "", "d/", ".gguf"])
def test_names_that_are_none(path):
    with pytest.raises(pgs.BadPlan) as caught:
        shard_paths(path, 2)
    assert "x-" not in path or "x.gguf" in caught.value.hint


# --- files ----------------------------------------------------------------------------------------------------------

LIMITS = [
    dict(max_size=60_000),
    dict(max_tensors=10),
    dict(max_tensors=1),
    dict(max_tensors=10_000),
    dict(max_tensors=7, first_empty=True),
    dict(max_size=100, first_empty=True),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return canonical(moe_models.deepseek2(tmp_path_factory.mktemp("split") / "m.gguf"))


def canonical(path):
    """As we write it: tensors packed in order, the last one padded too."""
    out = path.with_name("c-" + path.name)
    with pgs.open(str(path)) as model:
        pgs.Plan(model).write(str(out))
    return out


def split(source, target, **options):
    with pgs.open(str(source)) as model:
        return pgs.Plan(model).split(**options).write(str(target)).paths


def join(shard, target):
    with pgs.open(str(shard)) as model:
        assert pgs.Plan(model).write(str(target)).paths == [str(target)]
    return target.read_bytes()


def foreign_split(path, groups):
    """The bytes of llama-gguf-split's shards, from the tensors of each, with struct and gguf-py's reader only."""
    reader = gguf.GGUFReader(path)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    raw = [b"".join(bytes(part) for part in f.parts) for f in fields]
    count = len(reader.tensors)
    for number, group in enumerate(groups):
        kvs = [
            kv("split.no", "u16", number),
            kv("split.tensors.count", "i32", count),
            kv("split.count", "u16", len(groups)),
        ]
        infos, data = [], b""
        for t in (reader.tensors[i] for i in group):
            infos.append(info(t.name, tuple(int(n) for n in t.shape), int(t.tensor_type), len(data)))
            data = pad(data + t.data.tobytes())
        yield pad(header((raw if number == 0 else []) + kvs, infos)) + data


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_shards_are_those_of_llama_gguf_split_and_join_again(tmp_path, source, options):
    paths = split(source, tmp_path / "out.gguf", **options)
    tensors = gguf.GGUFReader(source).tensors
    limits = {"max_bytes": options.get("max_size"), "max_tensors": options.get("max_tensors")}
    first_empty = options.get("first_empty", False)
    groups = gguf_split([t.n_bytes for t in tensors], **limits, first_empty=first_empty, strict=False)
    assert [p.removeprefix(str(tmp_path)) for p in paths] == [
        f"/out-{i + 1:05d}-of-{len(groups):05d}.gguf" for i in range(len(groups))
    ]
    for path, expected in zip(paths, foreign_split(source, groups), strict=True):
        with open(path, "rb") as file:
            assert file.read() == expected, path
        gguf.GGUFReader(path)
    assert join(paths[-1] if len(paths) > 1 else paths[0], tmp_path / "joined.gguf") == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["joined.gguf", *(p.rsplit("/")[-1] for p in paths)])


@pytest.mark.parametrize("alignment", [64, 256])
def test_another_alignment(tmp_path, alignment):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal(i + 1).astype(np.float32) for i in range(5)}
    source = canonical(make_gguf(tmp_path / "m.gguf", "llama", tensors=tensors, alignment=alignment))
    paths = split(source, tmp_path / "out.gguf", max_tensors=2)
    for path in paths:
        reader = gguf.GGUFReader(path)
        assert reader.alignment == alignment
        for t in reader.tensors:
            assert np.array_equal(t.data, tensors[t.name])
    assert join(paths[0], tmp_path / "joined.gguf") == source.read_bytes()


def test_keep(tmp_path, source):
    shards = split(source, tmp_path / "in.gguf", max_tensors=9, first_empty=True)
    with pgs.open(shards[0]) as model:
        plan = pgs.Plan(model).split(keep=True)
        again = plan.write(str(tmp_path / "again")).paths
        assert len(again) == len(shards)
        for a, b in zip(shards, again, strict=True):
            with open(a, "rb") as x, open(b, "rb") as y:
                assert x.read() == y.read()
        encoded = plan.quantize("Q8_0").write(str(tmp_path / "q8.gguf")).paths
    with pgs.open(shards[0]) as a, pgs.open(encoded[-1]) as b:
        assert {n: t.source for n, t in a.tensors.items()} == {n: t.source for n, t in b.tensors.items()}


def test_keep_of_one_file_is_one_file(tmp_path, source):
    assert split(source, tmp_path / "out.gguf", keep=True) == [str(tmp_path / "out.gguf")]
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()


def test_a_shard_that_lost_all_its_tensors_goes(tmp_path, source):
    with pgs.open(str(source)) as model:
        first = next(i for i, name in enumerate(model.tensors) if name.startswith("blk.1."))
        last = first + sum(name.startswith("blk.1.") for name in model.tensors)
    shards = split(source, tmp_path / "in.gguf", max_tensors=1)
    with pgs.open(shards[0]) as model:
        paths = pgs.Plan(model).prune_layers([1]).split(keep=True).write(str(tmp_path / "out.gguf")).paths
    assert len(paths) == len(shards) - (last - first)
    with pgs.open(paths[0]) as model:
        assert not any(name.startswith("blk.2.") for name in model.tensors)


def test_a_large_tensor_is_named(tmp_path, source):
    with pgs.open(str(source)) as model:
        checked = pgs.Plan(model).split(max_size=20_000).check()
        large = [t.name for t in model.tensors.values() if t.nbytes > 20_000]
    assert len(large) > 2 and not checked.blockers
    (text,) = checked.warnings
    assert text.split(" ")[0] in large and text.endswith(f"; {len(large) - 1} more tensors are too large")


def test_a_shard_name_is_no_output(tmp_path, source):
    with pgs.open(str(source)) as model, pytest.raises(pgs.BadPlan, match="name of a shard"):
        pgs.Plan(model).split(max_tensors=9).write(str(tmp_path / "x-00001-of-00003.gguf"))
    assert not list(tmp_path.iterdir())


# --- llama.cpp ------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from llama_cpp import llama_cpp as llama

llama.llama_backend_init()
sizes = []
for path in sys.argv[1:]:
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model, path
    sizes.append([llama.llama_model_size(model), llama.llama_model_n_params(model)])
print("sizes", json.dumps(sizes))
"""


@pytest.mark.parity
@pytest.mark.parametrize("name", moe_models.LOADABLE)
def test_llama_cpp_loads_the_shards(tmp_path, name):
    pytest.importorskip("llama_cpp")
    source = moe_models.ALL[name](tmp_path / "m.gguf")
    firsts = [
        split(source, tmp_path / f"o{i}", **options)[0]
        for i, options in enumerate(
            [dict(max_tensors=5), dict(max_size=30_000), dict(max_tensors=6, first_empty=True), dict(max_tensors=999)]
        )
    ]
    done = subprocess.run([sys.executable, "-c", CHILD, str(source), *firsts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(re.search(r"^sizes (.*)$", done.stdout, re.M)[1])
    assert sizes == sizes[:1] * 5 and sizes[0][1] > 10_000


@pytest.mark.parity
@pytest.mark.parametrize(
    "options, theirs",
    [
        (dict(max_tensors=5), ["--split-max-tensors", "5"]),
        (dict(max_size="1MB"), ["--split-max-size", "1M"]),
        (dict(max_tensors=7, first_empty=True), ["--split-max-tensors", "7", "--no-tensor-first-split"]),
        (dict(max_tensors=999), ["--split-max-tensors", "999"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["deepseek2", "qwen3next", "gpt_oss"])
def test_the_same_files_as_llama_gguf_split(tmp_path, name, options, theirs):
    """Of tensors whose outermost axis is longer than 1: ggml drops such an axis when it writes a header, we keep it."""
    tool = shutil.which("llama-gguf-split")
    if tool is None:
        pytest.skip("no llama-gguf-split on PATH")
    source = canonical(moe_models.ALL[name](tmp_path / "m.gguf"))
    ours = split(source, tmp_path / "ours.gguf", **options)
    subprocess.run([tool, "--split", *theirs, str(source), str(tmp_path / "theirs")], check=True, capture_output=True)
    found = sorted(tmp_path.glob("theirs-*"))
    assert [p.name.removeprefix("theirs") for p in found] == [p.rpartition("/ours")[2] for p in ours]
    for path, other in zip(found, ours, strict=True):
        with open(other, "rb") as file:
            assert path.read_bytes() == file.read(), path.name
    subprocess.run([tool, "--merge", ours[0], str(tmp_path / "joined.gguf")], check=True, capture_output=True)
    assert join(ours[0], tmp_path / "again.gguf") == source.read_bytes()
    with pgs.open(str(tmp_path / "joined.gguf")) as a, pgs.open(str(source)) as b:
        assert list(a.tensors) == list(b.tensors)
        assert all(np.array_equal(t.bytes(), b.tensors[n].bytes()) for n, t in a.tensors.items())
