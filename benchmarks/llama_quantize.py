"""llama.cpp's own quantizer, through llama-cpp-python: llama_quantize.py IN OUT TYPE THREADS [IMATRIX]"""

import ctypes
import sys

import numpy as np
from llama_cpp import llama_cpp as llama

import pygguf_surgery as pgs
from pygguf_surgery.recipes import mixes

source, target, name, threads = sys.argv[1:5]
silent = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(silent, None)
params = llama.llama_model_quantize_default_params()
params.ftype = mixes.file_type(name, False).number
params.nthread = int(threads)
rows = {}
if len(sys.argv) > 5:
    with pgs.imatrix.open(sys.argv[5]) as matrix:
        rows = {entry: np.ascontiguousarray(matrix.importance(entry)) for entry in matrix.entries}
    floats = ctypes.POINTER(ctypes.c_float)
    params.imatrix = (llama.llama_model_imatrix_data * (len(rows) + 1))(
        *((entry.encode(), row.ctypes.data_as(floats), row.size) for entry, row in rows.items())
    )
if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
    raise SystemExit("llama_model_quantize failed")
