"""Numbers to encode, the same on every machine and with every numpy: from raw random integers by exact operations
only."""

from __future__ import annotations

import numpy as np

LARGEST = np.float32(2.0**47)  # kernels see magnitudes below 2^48, ggml itself what is above


def raw(seed, n):
    return np.random.PCG64(seed).random_raw(n).astype(np.uint64)


def uniform(seed, shape):
    """Multiples of 2^-24 in [0, 1)."""
    n = int(np.prod(shape))
    return ((raw(seed, n) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def ordinary(rows, k, seed):
    """Bell-shaped, about 0.02 wide, float32 [rows, k]; rows differ in scale by powers of two."""
    u = raw(seed, rows * k)
    parts = sum(((u >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4)) - 131070
    x = parts.reshape(rows, k).astype(np.float32) * np.float32(2.0**-20)
    return x * (np.float32(2.0) ** (raw(seed + 1, rows) % np.uint64(5)).astype(np.float32)[:, None])


def strange(rows, k, seed):
    """float32 [rows, k]: every 32 numbers in a row are of a kind of their own, some of them ordinary. None is too large
    for a scale of 16 bits."""
    x = ordinary(rows, k, seed)
    kinds = raw(seed + 2, rows * (-(-k // 32))).reshape(rows, -1) % np.uint64(20)
    scales = (raw(seed + 3, rows * (-(-k // 32))).reshape(rows, -1) % np.uint64(42)).astype(np.int64) - 30
    u = raw(seed + 4, rows * k).reshape(rows, k)
    for row in range(rows):
        for i in range(0, k, 32):
            part, v = slice(i, i + 32), u[row, i : i + 32]
            n = len(v)
            low = (v & np.uint64(0xFF)).astype(np.int64)
            c = np.float32(2.0) ** np.float32(scales[row, i // 32])
            place = int(v[0] >> np.uint64(8)) % n
            y = x[row, part]
            match int(kinds[row, i // 32]):
                case 0:
                    y[:] = 0
                case 1:
                    y[:] = -0.0
                case 2:
                    y[:] = c
                case 3:
                    y[:] = -c
                case 4:
                    y[:] = (low % 33 - 16).astype(np.float32) / 8  # ties
                case 5:
                    y[:] = (low % 5 - 2).astype(np.float32) * c
                case 6:
                    y[:] = np.where(low % 2, c, -c)
                case 7:
                    y[:], y[place] = 0, c  # a spike
                case 8:
                    y[place] = c
                case 9:
                    y[:] = np.abs(y)
                case 10:
                    y[:] = -np.abs(y) - 1
                case 11:
                    y[low % 2 == 0] = 0
                case 12:
                    y[low % 2 == 0] = -0.0
                case 13:
                    y *= c  # small and large
                case 14:
                    y *= np.float32(2.0) ** (low % 41 - 30).astype(np.float32)  # a large range
                case 15:
                    y[:] = (0x3F800000 + low % 7 - 3).astype(np.uint32).view(np.float32)  # beside a power of two
                case 16:
                    y[: n // 2] = 0
                case 17:
                    y[:] = (np.arange(n) % 4 - 1).astype(np.float32)
                case _:
                    pass
    return x


def huge(rows, k, seed):
    """As strange, far beyond what many types can hold: float32 [rows, k]."""
    return np.clip(strange(rows, k, seed) * np.float32(2.0**36), -LARGEST, LARGEST)


def tiny(rows, k, seed):
    """Denormals and their neighbours, whole rows of them: float32 [rows, k]."""
    scale = np.float32(2.0) ** (-(raw(seed, rows) % np.uint64(40)).astype(np.float32) - 100)
    return ordinary(rows, k, seed) * scale[:, None]


def importance(k, seed, kind):
    """float32 [k]: 0 ordinary, 1 with zeros and stretches of zeros, 2 with tiny values."""
    w = (uniform(seed + 5, (k,)) + np.float32(2.0**-10)) * np.float32(2.0) ** (raw(seed + 6, k) % np.uint64(8)).astype(
        np.float32
    )
    some = raw(seed + 7, k) % np.uint64(3) == 0
    if kind == 1:
        w[some] = 0
        if k > 64:
            w[k // 2 : k // 2 + 32] = 0
    if kind == 2:
        w[some] *= np.float32(2.0**-66)
    return w
