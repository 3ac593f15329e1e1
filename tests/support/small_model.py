"""The model that most tests of the shell use, made in a moment."""

from __future__ import annotations

import numpy as np

from pygguf_surgery import imatrix
from pygguf_surgery import open as open_model
from pygguf_surgery.cli.commands.demo_model import DemoShape

SMALL = DemoShape(
    layers=4,
    embedding=64,
    experts=8,
    used=2,
    feed_forward=32,
    heads=2,
    heads_kv=1,
    head=32,
    state=32,
    key_heads=1,
    value_heads=2,
    vocabulary=300,
)
BEST = 4  # experts kept in most tests


def everything_seen(model, path):
    """An importance matrix of ones for every matrix of the model."""
    with open_model(model) as source:
        entries = {
            name: (np.ones(t.elements // t.ne[1], np.float32), np.ones(t.shape[0] if len(t.shape) == 3 else 1))
            for name, t in source.tensors.items()
            if len(t.shape) > 1
        }
    imatrix.write(path, entries)
