"""What people do without this library: status_quo.py IN OUT.f16 OUT KEEP

Slices the experts with the largest router-row norms out of IN with gguf-py and numpy, writes an intermediate file of
the source's types, and runs llama.cpp's llama_model_quantize (MXFP4_MOE, through llama-cpp-python) on it.
"""

import ctypes
import re
import sys

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

source, between, target, keep = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])


def cut() -> None:
    reader = GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(between, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = keep if field.name == architecture + ".expert_count" else field.contents()
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    kept = {}
    for t in reader.tensors:
        if m := re.fullmatch(r"blk\.(\d+)\.ffn_gate_inp\.weight", t.name):
            norms = np.linalg.norm(t.data.astype(np.float64), axis=1)
            kept[m[1]] = np.sort(np.argsort(-norms, kind="stable")[:keep])
    for t in reader.tensors:
        m = re.fullmatch(r"blk\.(\d+)\.ffn_((gate|up|down)_exps|gate_inp)\.weight", t.name)
        writer.add_tensor(t.name, t.data[kept[m[1]]] if m else t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize() -> None:
    from llama_cpp import llama_cpp as llama

    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    params = llama.llama_model_quantize_default_params()
    params.ftype = 38  # MXFP4_MOE
    if llama.llama_model_quantize(between.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit("llama_model_quantize failed")


cut()
quantize()
