"""Small files for tests, written by gguf-py: an independent writer."""

from __future__ import annotations

import gguf
import numpy as np


def make_gguf(path, architecture="test", metadata=None, tensors=None, alignment=None):
    """metadata: key -> (value, gguf.GGUFValueType) or (value, ARRAY, element type); tensors: name -> float32 array, or
    (uint8 array of encoded rows, gguf.GGMLQuantizationType)."""
    writer = gguf.GGUFWriter(str(path), architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, spec in (metadata or {}).items():
        value, kind, *element = spec
        writer.add_key_value(key, value, kind, sub_type=element[0] if element else None)
    for name, data in (tensors or {}).items():
        if isinstance(data, tuple):
            array, kind = data
            writer.add_tensor(name, array, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path):
    """(metadata as Python values, tensors as {name: (type name, numpy array of gguf-py)}) by gguf-py."""
    reader = gguf.GGUFReader(str(path))
    metadata = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    return metadata, tensors
