"""open, Model, Metadata, Tensor: against gguf-py, and what is refused."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import BadFile, BadPlan, Unsupported
from pygguf_surgery.base.runs import merge_adjacent
from support.gguf_bytes import gguf as hand_made
from support.gguf_bytes import info, kv
from support.gguf_files import make_gguf, read_gguf

T = gguf.GGUFValueType
Q = gguf.GGMLQuantizationType


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def tensors():
    return {
        "token_embd.weight": noise(12, 64),
        "blk.0.ffn_up_exps.weight": noise(4, 6, 64).astype(np.float16),
        "blk.0.ffn_down_exps.weight": (gguf.quants.quantize(noise(4, 6, 64, seed=1), Q.Q8_0), Q.Q8_0),
        "blk.0.attn_q.weight": (gguf.quants.quantize(noise(6, 64, seed=2), Q.BF16), Q.BF16),
        "blk.0.ids": np.arange(6, dtype=np.int32),
        "output_norm.weight": noise(64),
    }


@pytest.fixture
def path(tmp_path, tensors):
    return make_gguf(
        tmp_path / "m.gguf",
        "test",
        {
            "general.name": ("A model", T.STRING),
            "test.expert_count": (4, T.UINT32),
            "test.scale": (0.5, T.FLOAT32),
            "tokenizer.ggml.tokens": (["a", "ü"], T.ARRAY, T.STRING),
        },
        tensors,
    )


def values(tensor):
    """float32 by gguf-py."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_what_is_in_the_file(path):
    with pgs.open(path) as model:
        metadata, _ = read_gguf(path)
        assert dict(model.metadata) == metadata
        assert list(model.metadata) == list(metadata)
        assert (model.architecture, model.name, model.alignment) == ("test", "A model", 32)
        assert model.file_bytes == os.path.getsize(path)
        assert model.get("expert_count") == 4 and model.get("nothing", 7) == 7
        assert model.paths == [str(path)] and model.path == str(path)
        reader = gguf.GGUFReader(str(path))
        assert list(model.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            ours = model.tensors[t.name]
            assert ours.ne == tuple(t.shape) and ours.shape == tuple(reversed(t.shape))
            assert (ours.type, ours.type_id, ours.nbytes) == (t.tensor_type.name, int(t.tensor_type), t.n_bytes)
            assert ours.elements == t.n_elements and ours.source == 0 and ours.offset == t.data_offset


def test_opening_by_text_or_path(path):
    assert list(pgs.open(str(path)).tensors) == list(pgs.open(Path(path)).tensors)


def test_metadata_is_exact(path):
    metadata = pgs.open(path).metadata
    assert metadata.value("test.expert_count") == pgs.Value(4, "u32")
    assert metadata.value("tokenizer.ggml.tokens") == pgs.Value(["a", "ü"], "str[]")
    fresh = metadata.exact()
    fresh.clear()
    assert len(metadata) == 5 and "general.name" in metadata and "general.nothing" not in metadata
    with pytest.raises(KeyError):
        metadata["general.nothing"]


def test_bytes_are_a_read_only_view(path):
    model = pgs.open(path)
    for t in gguf.GGUFReader(str(path)).tensors:
        view = model.tensors[t.name].bytes()
        assert view.dtype == np.uint8 and view.tobytes() == t.data.tobytes()
        assert not view.flags.writeable and not view.flags.owndata
    model.close()
    assert view.tobytes() == t.data.tobytes()  # a view outlives the model


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "blk.0.ffn_up_exps.weight",
        "blk.0.ffn_down_exps.weight",
        "blk.0.attn_q.weight",
        "output_norm.weight",
    ],
)
def test_dequantize(path, name):
    model = pgs.open(path)
    tensor = model.tensors[name]
    expected = values(next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == name)).reshape(tensor.shape)
    whole = tensor.dequantize()
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(tensor.dequantize(experts=[3, 0, 1, 1]), expected[[3, 0, 1, 1]])
    np.testing.assert_array_equal(tensor.dequantize(experts=2), expected[[2]])
    np.testing.assert_array_equal(tensor.dequantize(experts=np.array([1, 2])), expected[1:3])
    flat = expected.reshape(-1, expected.shape[-1])
    rows = range(0, len(flat), 2)
    np.testing.assert_array_equal(tensor.dequantize(rows=rows), flat[list(rows)])
    assert tensor.dequantize(rows=[]).shape == (0, expected.shape[-1])


def test_a_model_outlives_a_change_of_folder(path, tmp_path, monkeypatch):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / "link").symlink_to(other)  # link/.. is tmp_path, also for those who would take the name apart
    for name in ("m.gguf", b"m.gguf", "link/../m.gguf"):
        monkeypatch.chdir(tmp_path)
        with pgs.open(name) as model:
            monkeypatch.chdir(other)
            plan = pgs.Plan(model)
            assert pgs.Plan.from_json(plan.to_json()) == plan
            plan.write("out.gguf")
            (other / "out.gguf").unlink()


def test_dequantize_refuses(path):
    tensors = pgs.open(path).tensors
    tensor = tensors["blk.0.ffn_up_exps.weight"]
    for index in (4, -1):
        with pytest.raises(BadPlan) as e:
            tensor.dequantize(experts=[index])
        assert e.value.object == tensor.name and e.value.expected == "0..3"
    for none in ([0.5], True, [True, False, True, True], np.ones(4, bool), np.array([[1, 2]]), slice(0, 2), "1"):
        with pytest.raises(BadPlan, match="whole number"):
            tensor.dequantize(experts=none)
    with pytest.raises(BadPlan):
        tensor.dequantize(rows=[24])
    with pytest.raises(BadPlan):
        tensor.dequantize(rows=[0], experts=[0])
    with pytest.raises(Unsupported) as u:
        tensors["blk.0.ids"].dequantize()
    assert u.value.found == "I32"


def sparse(path, experts):
    """A file of one F16 tensor [experts, 1024, 1024], all holes."""
    data = hand_made([kv("general.architecture", "str", "test")], [info("big", (1024, 1024, experts), 1)], b"")
    data += bytes(-len(data) % 32)
    with open(path, "wb") as f:
        f.write(data)
        f.truncate(len(data) + experts * 2**21)
    return len(data)


def test_only_what_is_asked_for_is_read(tmp_path):
    path = tmp_path / "big.gguf"
    start = sparse(path, 2**19)  # 1 TiB
    with open(path, "r+b") as f:
        f.seek(start + 2**21 * 500_000)
        f.write(np.full(2, 1.5, np.float16).tobytes())
    model = pgs.open(path)
    assert model.tensors["big"].nbytes == 2**40
    two = model.tensors["big"].dequantize(experts=[7, 500_000])
    assert two.shape == (2, 1024, 1024) and two.sum() == 3 and two[1, 0, 1] == 1.5


def test_a_closed_model(path):
    model = pgs.open(path)
    model.close()
    model.close()
    assert model.metadata["general.name"] == "A model"
    with pytest.raises(ValueError):
        model.tensors["token_embd.weight"].dequantize()


def test_threads_share_a_model(path):
    model = pgs.open(path)
    expected = {name: t.dequantize() for name, t in model.tensors.items() if t.type != "I32"}
    with ThreadPoolExecutor(8) as pool:
        for name, result in [(n, pool.submit(model.tensors[n].dequantize)) for n in expected for _ in range(20)]:
            np.testing.assert_array_equal(result.result(), expected[name])


def test_the_header_digest(path, tmp_path):
    model = pgs.open(path)
    head = Path(path).read_bytes()[: model.header_bytes]
    assert model.header_sha256 == hashlib.sha256(head).hexdigest()
    assert model.header_bytes == gguf.GGUFReader(str(path)).data_offset


def test_no_architecture(tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(hand_made([kv("a.b", "u8", 1)], [], b""))
    assert pgs.open(path).architecture == "" and pgs.open(path).name == ""
    path.write_bytes(hand_made([kv("general.architecture", "u8", 1)], [], b""))
    with pytest.raises(BadFile) as e:
        pgs.open(path)
    assert e.value.object == "general.architecture"


def test_strict_and_metadata_only(tmp_path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(hand_made([kv("general.architecture", "str", "test"), kv("Odd Key", "u8", 1)], [], b""))
    assert pgs.open(path).warnings
    with pytest.raises(BadFile):
        pgs.open(path, strict=True)
    path.write_bytes(hand_made([kv("general.architecture", "str", "test")], [info("t", (32,), 0)], b""))
    with pytest.raises(BadFile):
        pgs.open(path)
    model = pgs.open(path, metadata_only=True)
    assert list(model.tensors) == ["t"]
    assert [b.problem for b in pgs.Plan(model).check().blockers] == ["opened for its metadata only"]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        pgs.open(tmp_path / "none.gguf")
    with pytest.raises(BadFile):
        pgs.open(tmp_path)
    (tmp_path / "text").write_text("hello, this is no model")
    with pytest.raises(BadFile) as e:
        pgs.open(tmp_path / "text")
    assert e.value.path == str(tmp_path / "text")


def test_merge_adjacent():
    assert merge_adjacent([0, 1, 2, 5, 4, 6, 7]) == [(0, 3), (5, 1), (4, 1), (6, 2)]
    assert merge_adjacent([]) == []


# --- shards ---------------------------------------------------------------------------------------------------------


def split(folder, *, first_only_metadata=False):
    """A model of five tensors in several shards, written by gguf-py."""
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "test", split_max_tensors=2, small_first_shard=first_only_metadata)
    writer.add_name("Split")
    for i in range(5):
        writer.add_tensor(f"blk.{i}.attn_q.weight", noise(3, 32, seed=i))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


@pytest.mark.parametrize("first_only_metadata", [False, True])
def test_any_shard_opens_the_model(tmp_path, first_only_metadata):
    paths = split(tmp_path, first_only_metadata=first_only_metadata)
    assert len(paths) == 3 + first_only_metadata
    for path in paths:
        with pgs.open(path) as model:
            assert model.paths == [str(p) for p in paths] and model.path == str(paths[0])
            assert list(model.tensors) == [f"blk.{i}.attn_q.weight" for i in range(5)]
            assert (model.architecture, model.name) == ("test", "Split")
            assert not [key for key in model.metadata if key.startswith("split.")]
            assert model.file_bytes == sum(os.path.getsize(p) for p in paths)
            for i, tensor in enumerate(model.tensors.values()):
                np.testing.assert_array_equal(tensor.dequantize(), noise(3, 32, seed=i))
                assert (
                    Path(model.paths[tensor.source]).read_bytes()[tensor.offset :][: tensor.nbytes]
                    == tensor.bytes().tobytes()
                )
            heads = b"".join(p.read_bytes()[: gguf.GGUFReader(str(p)).data_offset] for p in paths)
            assert model.header_sha256 == hashlib.sha256(heads).hexdigest()


def test_a_missing_shard(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(BadFile) as e:
        pgs.open(paths[0])
    assert paths[1].name in e.value.problem and (e.value.found, e.value.expected) == (2, 3)


def test_a_renamed_shard(tmp_path):
    paths = split(tmp_path)
    paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(BadFile) as e:
        pgs.open(tmp_path / "first.gguf")
    assert "00001-of-00004" in e.value.expected


def shard(path, number, count, total, names, architecture="test", keys=()):
    items = [kv("general.architecture", "str", architecture)] if architecture else []
    items += [kv("split.no", "u16", number), kv("split.count", "u16", count), kv("split.tensors.count", "i32", total)]
    items = [item for item in items if not any(key.encode() in item for key in keys)]
    path.write_bytes(
        hand_made(items, [info(n, (32,), 0, 128 * i) for i, n in enumerate(names)], bytes(128 * len(names)))
    )


@pytest.mark.parametrize(
    "second, problem",
    [
        (dict(number=0), "split.no"),
        (dict(count=3), "split.count"),
        (dict(total=3), "split.tensors.count"),
        (dict(keys=["split.no"]), "split.no"),
        (dict(architecture="other"), "general.architecture"),
        (dict(names=["a"]), "a"),
    ],
)
def test_shards_that_do_not_belong_together(tmp_path, second, problem):
    one, two = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    shard(one, 0, 2, 2, ["a"])
    shard(two, **{"number": 1, "count": 2, "total": 2, "names": ["b"], "architecture": "", **second})
    with pytest.raises(BadFile) as e:
        pgs.open(one)
    assert e.value.object == problem and e.value.path == str(two)


def test_the_name_and_the_count_differ(tmp_path):
    path = tmp_path / "m-00001-of-00003.gguf"
    shard(path, 0, 2, 1, ["a"])
    with pytest.raises(BadFile) as e:
        pgs.open(path)
    assert e.value.object == "split.count"


def test_a_split_of_one_is_a_whole_model(tmp_path):
    path = tmp_path / "anything.gguf"
    shard(path, 0, 1, 1, ["a"])
    assert list(pgs.open(path).tensors) == ["a"]
