"""llama.cpp's hand-crafted files (tests/test-gguf.cpp), each by its name, built alike from another random stream.

Two rules are ours and differ (see the two marks `ours` below): a tensor name over 63 bytes is a warning when reading,
because other programs write and read such files and a rename repairs them; and a file that lacks only the padding after
its last tensor is a warning, because nothing of a tensor is missing.
"""

import random

import gguf
import pytest

from pygguf_surgery._core import Source, read_header, types
from pygguf_surgery.base.errors import BadFile
from support.gguf_bytes import F32, I8, I64, IDS, info, scalar, string, u32, u64

REFUSE, ACCEPT = "refuse", "accept"
CASES = {
    "HEADER_BAD_MAGIC": (REFUSE, "not a GGUF"),
    "HEADER_BAD_VERSION_0": (REFUSE, "version"),
    "HEADER_BAD_VERSION_1": (REFUSE, "version 1"),
    "HEADER_BAD_VERSION_FUTURE": (REFUSE, "version"),
    "HEADER_BAD_N_KV": (REFUSE, "too short for this count"),
    "HEADER_BAD_N_TENSORS": (REFUSE, "too short for this count"),
    "HEADER_EMPTY": (ACCEPT, None),
    "KV_BAD_KEY_SIZE": (REFUSE, "key runs past"),
    "KV_EMPTY_KEY": (REFUSE, "is empty"),
    "KV_BAD_TYPE": (REFUSE, "unknown value type"),
    "KV_DUPLICATE_KEY": (REFUSE, "duplicate key"),
    "KV_BAD_ALIGN": (REFUSE, "unusable alignment"),
    "KV_WRONG_TYPE_ALIGN": (REFUSE, "wrong value type"),
    "KV_SUCCESS": (ACCEPT, None),
    "TENSORS_BAD_NAME_SIZE": (ACCEPT, "longer than 63 bytes"),  # ours: llama.cpp refuses
    "TENSORS_BAD_N_DIMS": (REFUSE, "too many dimensions"),
    "TENSORS_BAD_SHAPE": (REFUSE, "negative dimension"),
    "TENSORS_ZERO_DIM": (ACCEPT, None),
    "TENSORS_NE_TOO_BIG": (REFUSE, None),  # overflow, or first no multiple of the block
    "TENSORS_NBYTES_TOO_BIG": (REFUSE, "overflow"),
    "TENSORS_NBYTES_PAD_WRAP": (REFUSE, "overflow"),
    "TENSORS_BAD_TYPE": (REFUSE, "unknown tensor type"),
    "TENSORS_BAD_OFFSET": (REFUSE, "not aligned"),
    "TENSORS_DUPLICATE_NAME": (REFUSE, "duplicate tensor name"),
    "TENSORS_BAD_ALIGN": (REFUSE, "unusable alignment"),
    "TENSORS_INCONSISTENT_ALIGN": (REFUSE, "not aligned"),
    "TENSORS_SUCCESS": (ACCEPT, None),
    "TENSORS_CUSTOM_ALIGN": (ACCEPT, None),
    "DATA_NOT_ENOUGH_DATA": (REFUSE, "beyond the file"),  # ours: a warning where only padding is missing, see the test
    "DATA_BAD_ALIGN": (REFUSE, "unusable alignment"),
    "DATA_INCONSISTENT_ALIGN": (REFUSE, "not aligned"),
    "DATA_MEM_SIZE_OVERFLOW": (REFUSE, "overflow"),
    "DATA_SUCCESS": (ACCEPT, None),
    "DATA_CUSTOM_ALIGN": (ACCEPT, None),
}


class Crafted:
    """The bytes of one case, and what was written into them."""

    def __init__(self, case, seed):
        self.case = case
        self.room = case.split("_")[0]
        rng = random.Random(f"{case} {seed}")
        self.alignment = 32
        self.tensors = [] if self.room in ("HEADER", "KV") else self.tensor_configs(rng)
        self.kvs = [] if self.room == "HEADER" else self.kv_configs(rng)
        declares_alignment = self.declares_alignment()
        n_tensors = -1 if case == "HEADER_BAD_N_TENSORS" else len(self.tensors)
        n_kv = -1 if case == "HEADER_BAD_N_KV" else len(self.kvs) + declares_alignment
        version = {"HEADER_BAD_VERSION_0": 0, "HEADER_BAD_VERSION_1": 1, "HEADER_BAD_VERSION_FUTURE": 4}.get(case, 3)
        out = (b"FUGG" if case == "HEADER_BAD_MAGIC" else b"GGUF") + u32(version) + u64(n_tensors) + u64(n_kv)
        out += self.kv_bytes()
        if declares_alignment:
            kind = "i32" if case == "KV_WRONG_TYPE_ALIGN" else "u32"
            self.alignment = 1 if CASES[case][0] == ACCEPT else 13
            out += string("general.alignment") + u32(IDS[kind]) + scalar(kind, self.alignment)
        if case.endswith("INCONSISTENT_ALIGN"):
            self.alignment = 1
        out += self.tensor_infos()
        out += bytes(-len(out) % self.alignment)
        if self.room == "DATA":
            nbytes = self.data_bytes - (case == "DATA_NOT_ENOUGH_DATA")
            nbytes = 32 if case == "DATA_MEM_SIZE_OVERFLOW" else nbytes
            out += bytes(i % 256 for i in range(nbytes))
        self.bytes = out

    def declares_alignment(self):
        return self.case in (
            "KV_BAD_ALIGN",
            "KV_WRONG_TYPE_ALIGN",
            "TENSORS_BAD_ALIGN",
            "TENSORS_CUSTOM_ALIGN",
            "DATA_BAD_ALIGN",
            "DATA_CUSTOM_ALIGN",
        )

    def tensor_configs(self, rng):
        if self.case == "DATA_MEM_SIZE_OVERFLOW":
            return [(I8, (0x7FFFFFFFFFFFFFC0, 1, 1, 1))] * 2
        if self.case == "TENSORS_NBYTES_PAD_WRAP":
            return [(F32, (4, 1073741823, 1073741825, 1))]
        known = {fact.id: fact.block for fact in types()}
        configs = []
        for _ in range(100):
            kind = rng.choice(list(gguf.GGMLQuantizationType))
            if kind not in known:
                continue
            shape = [1, 1, 1, 1]
            shape[0] = rng.randint(1, 10) * gguf.GGML_QUANT_SIZES[kind][0]
            for i in range(1, rng.randint(1, 4)):
                shape[i] = rng.randint(1, 10)
            configs.append((int(kind), tuple(shape)))
        return configs

    @staticmethod
    def kv_configs(rng):
        kinds = list(IDS)
        configs = []
        for _ in range(100):
            kind = rng.choice(kinds)
            if kind == "array":
                element = rng.choice(kinds)
                if element == "array":
                    continue
                if element == "str":
                    value = [rng.randbytes(rng.randint(0, 4)) for _ in range(rng.randint(0, 16))]
                else:
                    size = len(scalar(element, 0))
                    value = rng.randbytes(rng.randrange(64) // size * size)
                configs.append((f"{element}[]", value))
            elif kind == "str":
                configs.append((kind, rng.randbytes(rng.randrange(64))))
            else:
                configs.append((kind, rng.randbytes(len(scalar(kind, 0)))))
        return configs

    def kv_bytes(self):
        out = b""
        for i, (kind, value) in enumerate(self.kvs):
            key = f"my_key_{i // 2 if self.case == 'KV_DUPLICATE_KEY' else i}"
            if self.case == "KV_EMPTY_KEY":
                key = ""
            out += (u64(-1) if self.case == "KV_BAD_KEY_SIZE" else u64(len(key))) + key.encode()
            if self.case == "KV_BAD_TYPE":
                out += u32(13) + b"\1"
            elif kind == "str":
                out += u32(IDS["str"]) + string(value)
            elif kind.endswith("[]"):
                count = len(value) if kind == "str[]" else len(value) // len(scalar(kind[:-2], 0))
                out += u32(IDS["array"]) + u32(IDS[kind[:-2]]) + u64(count) + self.raw(kind, value)
            else:
                out += u32(IDS[kind]) + value
        return out

    @staticmethod
    def raw(kind, value):
        return b"".join(map(string, value)) if kind == "str[]" else value

    def tensor_infos(self):
        out = b""
        offset = 0
        self.offsets = []
        for i, (kind, shape) in enumerate(self.tensors):
            if self.case == "TENSORS_NBYTES_TOO_BIG":
                kind = I64
            name = "my_tensor" if self.case == "TENSORS_DUPLICATE_NAME" else f"my_tensor_{i}"
            if self.case == "TENSORS_BAD_NAME_SIZE":
                name += "_with_a_very_long_name_which_is_longer_than_what_is_allowed_for_ggml_tensors"
            n_dims = 2 if self.case in ("TENSORS_NE_TOO_BIG", "TENSORS_NBYTES_TOO_BIG", "TENSORS_ZERO_DIM") else 1
            if self.case != "TENSORS_ZERO_DIM":
                n_dims = max([n_dims] + [d + 1 for d in range(1, 4) if shape[d] != 1])
            dims = shape[:n_dims]
            if self.case == "TENSORS_BAD_SHAPE":
                dims = (-1,) * n_dims
            elif self.case == "TENSORS_ZERO_DIM":
                dims = (shape[0], 0)
            elif self.case == "TENSORS_NE_TOO_BIG":
                dims = (4 * (2**31 - 1),) * n_dims
            elif self.case == "TENSORS_NBYTES_TOO_BIG":
                dims = (int(1.01 * (2**64 // 8) ** (1 / n_dims)) + 1,) * n_dims
            written_type = max(fact.id for fact in types()) + 1 if self.case == "TENSORS_BAD_TYPE" else kind
            written = info(name, dims, written_type, -1 if self.case == "TENSORS_BAD_OFFSET" else offset)
            if self.case == "TENSORS_BAD_N_DIMS":
                at = len(string(name))
                written = written[:at] + u32(5) + written[at + 4 :]
            out += written
            self.offsets.append(offset)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            elements = 0 if self.case == "TENSORS_ZERO_DIM" else shape[0] * shape[1] * shape[2] * shape[3]
            self.last_bytes = elements // block * block_bytes
            offset += -(-self.last_bytes // self.alignment) * self.alignment
        self.data_bytes = offset
        return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_handcrafted(tmp_path, case, seed):
    crafted = Crafted(case, seed)
    path = tmp_path / "case.gguf"
    path.write_bytes(crafted.bytes)
    source = Source(str(path))
    metadata_only = crafted.room == "TENSORS"  # llama.cpp reads these without their data
    result, text = CASES[case]
    if case == "DATA_NOT_ENOUGH_DATA" and crafted.last_bytes % 32:
        result, text = ACCEPT, "lacks the padding"

    if result == REFUSE:
        with pytest.raises(BadFile) as caught:
            read_header(source, metadata_only=metadata_only)
        assert text is None or text in caught.value.problem
        return

    header = read_header(source, metadata_only=metadata_only)
    if text:
        assert any(text in warning for warning in header.warnings)
    assert header.version == 3
    assert header.alignment == crafted.alignment
    assert len(header.metadata) == len(crafted.kvs) + crafted.declares_alignment()
    for i, ((key, value), (kind, written)) in enumerate(zip(header.metadata, crafted.kvs, strict=False)):
        assert (key, value.type, value.raw) == (f"my_key_{i}", kind, crafted.raw(kind, written))
    assert len(header.tensors) == len(crafted.tensors)
    for tensor, offset, (kind, shape) in zip(header.tensors, crafted.offsets, crafted.tensors, strict=True):
        assert (tensor.offset, tensor.type) == (offset, kind)
        if case == "TENSORS_ZERO_DIM":
            assert tensor.nbytes == 0
            continue
        assert (*tensor.ne, 1, 1, 1)[:4] == shape
        if crafted.room == "DATA":
            data = source.read(header.data_offset + offset, tensor.nbytes)
            assert data.tobytes() == bytes((offset + j) % 256 for j in range(tensor.nbytes))


def test_all_34_are_here():
    assert len(CASES) == 34
