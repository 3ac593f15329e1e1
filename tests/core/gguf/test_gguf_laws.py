"""Laws of reader and writer: inverse of each other, agreement with gguf-py, safe on any bytes, bounded memory."""

import random
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pygguf_surgery._core import Source, Value, encode_header, read_header, types
from pygguf_surgery.base.errors import BadFile
from support import gguf_bytes as b
from support import gguf_files
from support.strategies import KEYS, canonical_headers, values


def tensor_fields(tensors):
    return [(t.name, t.ne, t.type, t.offset, t.nbytes) for t in tensors]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("laws") / "file.gguf"


def read_bytes(path, data, **options):
    path.write_bytes(data)
    return read_header(Source(str(path)), **options)


# --- inverse --------------------------------------------------------------------------------------------------------


@given(canonical_headers())
def test_what_is_written_is_read(path, case):
    metadata, tensors, alignment = case
    header, offsets, file_bytes = encode_header(metadata, tensors, alignment)
    read = read_bytes(path, header + bytes(file_bytes - len(header)), strict=True)
    assert read.version == 3 and read.alignment == alignment and read.data_offset == len(header)
    assert read.metadata == metadata
    assert tensor_fields(read.tensors) == tensor_fields(tensors)
    assert [read.data_offset + t.offset for t in read.tensors] == offsets
    assert encode_header(read.metadata, read.tensors, read.alignment) == (header, offsets, file_bytes)


@given(canonical_headers())
def test_gguf_py_reads_what_we_write(path, case):
    metadata, tensors, alignment = case
    # gguf-py takes a Q8_1 block for 40 bytes (ggml: 36) and cannot read an empty array, a scalar tensor or a tensor
    # without elements.
    known = {int(kind) for kind in gguf.GGMLQuantizationType} - {gguf.GGMLQuantizationType.Q8_1}
    metadata = [(key, value) for key, value in metadata if not value.type.endswith("[]") or len(value)]
    tensors = [t for t in tensors if t.type in known and t.ne and 0 not in t.ne]
    header, offsets, file_bytes = encode_header(metadata, tensors, alignment)
    data = np.arange(file_bytes - len(header), dtype=np.uint8).tobytes()
    path.write_bytes(header + data)
    if not tensors:
        return
    theirs = gguf.GGUFReader(str(path))
    fields = {f.name: f for f in theirs.fields.values() if not f.name.startswith("GGUF.")}
    assert list(fields) == [key for key, _ in metadata]
    for key, value in metadata:
        assert fields[key].contents() == value.value
        assert fields[key].types[-1].value == b.IDS[value.type.removesuffix("[]")]
    for tensor, offset, their in zip(tensors, offsets, theirs.tensors, strict=True):
        assert their.name == tensor.name and int(their.tensor_type) == tensor.type
        assert tuple(their.shape) == tensor.ne and their.data_offset == offset and their.n_bytes == tensor.nbytes


SCALAR_TYPES = {
    "u8": "UINT8",
    "i8": "INT8",
    "u16": "UINT16",
    "i16": "INT16",
    "u32": "UINT32",
    "i32": "INT32",
    "f32": "FLOAT32",
    "bool": "BOOL",
    "str": "STRING",
    "u64": "UINT64",
    "i64": "INT64",
    "f64": "FLOAT64",
}


@given(
    st.dictionaries(KEYS.filter(lambda k: k != "general.architecture"), values(), max_size=8),
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
)
def test_we_read_what_gguf_py_writes(path, metadata, shapes):
    def their(value):
        kind = gguf.GGUFValueType[SCALAR_TYPES[value.type.removesuffix("[]")]]
        return (value.value, gguf.GGUFValueType.ARRAY, kind) if value.type.endswith("[]") else (value.value, kind)

    # gguf-py leaves empty arrays out
    metadata = {key: value for key, value in metadata.items() if not value.type.endswith("[]") or len(value)}
    tensors = {f"t.{i}": np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for i, shape in enumerate(shapes)}
    gguf_files.make_gguf(path, metadata={key: their(value) for key, value in metadata.items()}, tensors=tensors)
    source = Source(str(path))
    header = read_header(source)
    assert header.warnings == []
    assert dict(header.metadata) == {"general.architecture": Value("test", "str"), **metadata}
    assert [t.name for t in header.tensors] == list(tensors)
    for tensor, array in zip(header.tensors, tensors.values(), strict=True):
        assert tensor.ne == array.shape[::-1]
        ours = source.read(header.data_offset + tensor.offset, tensor.nbytes).view(np.float32)
        assert np.array_equal(ours, array.ravel())


# --- any bytes ------------------------------------------------------------------------------------------------------


def read_or_refuse(path, data):
    """Reads in every mode. What is accepted keeps the promises that the rest of the package builds on."""
    try:
        header = read_bytes(path, data)
    except BadFile as error:
        assert error.problem and error.path == str(path)
        with pytest.raises(BadFile):
            read_header(Source(str(path)), strict=True)
        return None
    for tensor in header.tensors:
        assert header.data_offset + tensor.offset + tensor.nbytes <= len(data) or tensor.nbytes == 0
        assert tensor.offset % header.alignment == 0
    for _, value in header.metadata:
        value.value  # noqa: B018
        assert Value.from_raw(value.type, value.raw) == value
    assert len({key for key, _ in header.metadata}) == len(header.metadata)
    assert len({t.name for t in header.tensors}) == len(header.tensors)
    read_header(Source(str(path)), metadata_only=True)
    return header


SMALL = b.gguf(
    [
        b.kv("general.architecture", "str", "test"),
        b.kv("a.u8", "u8", 1),
        b.kv("a.bools", "bool[]", [1, 0]),
        b.kv("a.words", "str[]", ["one", "", "zwölf"]),
        b.kv("a.f64", "f64", 0.5),
        b.kv("a.i16", "i16[]", []),
    ],
    [b.info("t", (32, 2)), b.info("q", (64,), b.Q4_0, 256), b.info("s", (), b.F16, 320)],
    bytes(352),
)


@given(st.binary(max_size=300))
def test_random_bytes(path, data):
    read_or_refuse(path, data)


@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
def test_random_bytes_behind_a_good_start(path, data, n_tensors, n_kv):
    read_or_refuse(path, b.header(n_tensors=n_tensors, n_kv=n_kv) + data)


def test_truncated_at_each_byte(path):
    assert read_or_refuse(path, SMALL) is not None
    for size in range(len(SMALL)):
        header = read_or_refuse(path, SMALL[:size])
        assert header is None or size >= len(SMALL) - 30  # the scalar's padding


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bits(path, flips):
    data = bytearray(SMALL)
    for at, bits in flips:
        data[at] ^= bits
    read_or_refuse(path, bytes(data))


EXTREMES = [
    0,
    1,
    7,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**60,
    2**61,
    2**62,
    2**63 - 64,
    2**63 - 1,
    2**63,
    2**64 - 64,
    2**64 - 32,
    2**64 - 1,
]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_every_word_replaced_by_an_extreme(path, extreme):
    """At every byte of the header, as a u64 and as a u32."""
    end = read_bytes(path, SMALL).data_offset
    for at in range(4, end - 8):
        read_or_refuse(path, SMALL[:at] + b.u64(extreme) + SMALL[at + 8 :])
        if extreme < 2**32:
            read_or_refuse(path, SMALL[:at] + b.u32(extreme) + SMALL[at + 4 :])


@given(
    st.lists(st.one_of(st.sampled_from(EXTREMES), st.integers(0, 2**64 - 1)), max_size=4),
    st.integers(-1, 45),
    st.one_of(st.sampled_from(EXTREMES), st.integers(0, 600)),
)
@example([4, 0, 2**62, 2**62], 0, 0)  # ggml aborts
@example([4, 2**30 - 1, 2**30 + 1], 0, 0)  # the padding of 2^64 - 16 bytes wraps to 0
@example([2**63 - 64], 24, 0)
@example([1], 0, 2**64 - 32)  # gguf-py returns header bytes
def test_tensor_shapes_and_offsets(path, ne, kind, offset):
    header = read_or_refuse(path, b.gguf((), [b.info("t", ne, kind, offset)], bytes(512)))
    if header is None:
        return
    elements = 1
    for n in ne:  # Python's integers do not wrap
        elements *= n
    fact = next(fact for fact in types() if fact.id == kind)
    assert header.tensors[0].nbytes == elements // fact.block * fact.block_bytes


@given(st.lists(st.binary(max_size=140), max_size=8))
def test_string_arrays_are_utf8_exactly_when_python_says_so(path, strings):
    def is_utf8(raw):
        try:
            raw.decode()
        except UnicodeDecodeError:
            return False
        return True

    header = read_bytes(path, b.gguf([b.kv("k", "str[]", strings)]))
    assert bool(header.warnings) == (not all(map(is_utf8, strings)))
    assert [text.encode("utf-8", "surrogateescape") for text in header.metadata[0][1].value] == strings


@given(
    st.binary(min_size=1, max_size=24)
    | st.text(min_size=1, max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_keys_are_utf8_exactly_when_python_says_so(path, raw):
    try:
        valid = "\0" not in raw.decode()
    except UnicodeDecodeError:
        valid = False
    assert (read_or_refuse(path, b.gguf([b.kv(raw, "u8", 1)])) is not None) == valid


# --- memory: C++ allocations are invisible to tracemalloc, so a process of its own and its peak ---------------------

PEAK = """
import resource, sys
from pygguf_surgery._core import Source, read_header
from pygguf_surgery.base.errors import BadFile
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
read_header(Source(sys.argv[1]))
before = peak()
try:
    header = read_header(Source(sys.argv[2]))
    kept = len(header.metadata)
    print("accepted", peak() - before)
except BadFile as error:
    print("refused", peak() - before)
"""


def bomb_array():
    return b.gguf([b.string("k") + b.u32(9) + b.u32(0) + b.u64(10**9)])


BOMBS = {
    # name: (bytes, sparse size or None, result)
    "10^9 tensors": (b.gguf(n_tensors=10**9), None, "refused"),
    "10^9 tensors in a sparse file": (b.header(n_tensors=10**9), 2**36, "refused"),
    "10^9 keys in a sparse file": (b.header(n_kv=10**9), 2**36, "refused"),
    "u8 array of 10^9": (bomb_array(), None, "refused"),
    "u8 array of 2^40 in a sparse file": (
        b.header([b.string("k") + b.u32(9) + b.u32(0) + b.u64(2**40)]),
        2**41,
        "refused",
    ),
    "string array of 2^36 in a sparse file": (
        b.header([b.string("k") + b.u32(9) + b.u32(8) + b.u64(2**36)]),
        2**41,
        "refused",
    ),
    "string of 2^35 bytes in a sparse file": (b.header([b.string("k") + b.u32(8) + b.u64(2**35)]), 2**36, "refused"),
    "key of 2^35 bytes in a sparse file": (b.header([b.u64(2**35)], n_kv=1), 2**36, "refused"),
    "long padding": (
        b.gguf(
            [b.kv("general.alignment", "u32", 2**20)],
            [b.info(f"t{i}", (1,), offset=i * 2**20) for i in range(64)],
            bytes(2**26),
            alignment=2**20,
        ),
        None,
        "accepted",
    ),
    "200 000 strings": (b.gguf([b.kv("k", "str[]", ["word"] * 200_000)]), None, "accepted"),
    "8 MiB of string": (b.gguf([b.kv("k", "str", "x" * 2**23)]), None, "accepted"),
    "1 TiB of data": (b.gguf((), [b.info("t", (2**28,))]), 2**40, "accepted"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_memory_is_bounded_by_the_header(tmp_path, case):
    data, sparse_size, result = BOMBS[case]
    plain, bomb = tmp_path / "plain.gguf", tmp_path / "bomb.gguf"
    plain.write_bytes(b.gguf())
    bomb.write_bytes(data)
    if sparse_size:
        with open(bomb, "r+b") as file:
            try:
                file.truncate(sparse_size)
            except OSError:
                pytest.skip("the file system has no sparse file of this size")
    header_bytes = min(len(data), 2**23 + 100)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(plain), str(bomb)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=tmp_path,
    )  # the checkout has the package without its core
    outcome, grown = done.stdout.split()
    assert outcome == result
    assert int(grown) <= 16 * 2**20 + 8 * header_bytes


def test_a_large_header_is_read_whole(path):
    """Longer than the first window and its doublings, with seeded contents."""
    rng = random.Random(5)
    words = [rng.randbytes(rng.randrange(60)) for _ in range(100_000)]
    numbers = [rng.randrange(2**32) for _ in range(300_000)]
    data = b.gguf(
        [
            b.kv("words", "str[]", words),
            b.kv("text", "str", "é" * 1_500_000),
            b.string("numbers") + b.u32(9) + b.u32(4) + b.u64(len(numbers)) + struct.pack("<300000I", *numbers),
        ],
        [b.info(f"blk.{i}.weight", (0,)) for i in range(5_000)],
    )
    header = read_bytes(path, data)
    values = dict(header.metadata)
    assert values["words"].raw == b"".join(map(b.string, words))
    assert values["text"].value == "é" * 1_500_000
    assert values["numbers"].value == numbers
    assert [t.name for t in header.tensors] == [f"blk.{i}.weight" for i in range(5_000)]
