"""What can be done with importance matrices: merge, convert, slice, and say what they have seen. Streamed."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .._core import Sink
from ..architecture.experts import expert_rule
from ..architecture.names import layer_of
from ..base.errors import BadFile, BadPlan, SurgeryWarning
from ..base.words import either
from ..plan_data.choices import Keep
from ..plan_data.subject import Descent, Subject, Wanted
from .imatrix import CHUNK_SIZE, CHUNK_SIZE_KEY, Imatrix, name_bytes, open_imatrix, write
from .outputs import check_output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .imatrix import Sums

    Floats = NDArray[np.float32]
    Counts = NDArray[np.float32] | NDArray[np.float64]


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and not 1 <= chunk_size < 2**31:
        raise BadPlan("not a chunk size", object="chunk_size", found=chunk_size)


def _stream(imatrix: Imatrix, name: str, change: Callable[[Floats], Floats] | None = None) -> Sums:
    """The sums of an entry, `change` done to each piece."""

    def pieces() -> Iterator[Floats]:
        for piece in imatrix.pieces(name):
            yield piece if change is None else change(piece)
        imatrix.source.check_unchanged()

    return imatrix.entries[name].size, pieces


def merge(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    chunk_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Adds importance matrices of one model: sums (in float32) and counts add, as do the numbers of chunks; the data
    sets follow each other. An entry that only some have is kept; one count for all rows meets a count for each.

    BadPlan for those of two cuts, where both say of which they are; one that does not say counts as of the same.

    A legacy file enters as `convert` would write it, with the others' chunk size (or chunk_size, default 512). BadPlan:
    sizes or chunk sizes differ, the output is an input; BadFile, OSError, OutOfSpace. Memory: 16 MiB for each file.
    """
    if not paths:
        raise BadPlan("nothing to merge")
    _check_chunk_size(chunk_size)
    check_output(paths, output, overwrite)
    with ExitStack() as stack:
        inputs = [stack.enter_context(open_imatrix(path)) for path in paths]
        sizes = {m.chunk_size: m for m in inputs if m.format == "gguf"}
        if len(sizes) > 1:
            one, other = list(sizes)[:2]
            raise BadPlan(
                "importance matrices of different chunk sizes",
                path=sizes[other].path,
                object=CHUNK_SIZE_KEY,
                found=other,
                expected=f"{one}, as in {sizes[one].path}",
            )
        of = _common_subject(inputs)
        chunk_size = next(iter(sizes), None) or chunk_size or CHUNK_SIZE
        entries = {}
        for name in {name: None for m in inputs for name in m.entries}:
            entries[name] = _add([m for m in inputs if name in m.entries], name, chunk_size)
        write(
            output,
            entries,
            datasets=[d for m in inputs for d in m.datasets],
            chunk_size=chunk_size,
            chunk_count=sum(m.chunk_count for m in inputs),
            of=of,
            overwrite=overwrite,
        )


def _common_subject(inputs: Sequence[Imatrix]) -> Subject | None:
    """The model that all are for that say it."""
    first = next((m.of for m in inputs if m.of is not None), None)
    if first is None:
        return None
    for imatrix in inputs:
        if imatrix.of is None:
            warnings.warn(
                f"{imatrix.path}: does not say of which cut it is: taken for one of the same",
                SurgeryWarning,
                stacklevel=3,
            )
        else:
            imatrix.of.check_same(first, "the importance matrix is", path=imatrix.path)
    return first


def _add(inputs: list[Imatrix], name: str, chunk_size: int) -> tuple[Sums, Counts]:
    import numpy as np

    parts = [_raw(m, name, chunk_size) for m in inputs]
    size, rows = parts[0][0][0], next((len(counts) for _, counts in parts if len(counts) > 1), 1)
    for imatrix, ((other, _), counts) in zip(inputs, parts, strict=True):
        if other != size or len(counts) not in (1, rows):
            raise BadPlan(
                "entries of different sizes",
                path=imatrix.path,
                object=name,
                found=f"{other} sums, {len(counts)} counts",
                expected=f"{size} sums, {rows} counts, as in {inputs[0].path}",
            )

    def pieces() -> Iterator[Floats]:
        for several in zip(*(pieces() for (_, pieces), _ in parts), strict=True):
            with np.errstate(over="ignore"):  # refused below
                total = several[0].copy()
                for piece in several[1:]:
                    total += piece
            yield _finite(total, name, inputs[0].path)

    total_counts = np.zeros(rows)
    for _, counts in parts:
        total_counts += counts
    return (size, pieces), total_counts


def _raw(imatrix: Imatrix, name: str, chunk_size: int) -> tuple[Sums, Counts]:
    """Sums and counts as a GGUF file has them. Legacy numbers are per chunk: times chunk_size."""
    import numpy as np

    entry = imatrix.entries[name]
    if not entry.legacy:
        return _stream(imatrix, name), entry.counts

    def scale(piece: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return _finite(piece * np.float32(chunk_size), name, imatrix.path)

    return _stream(imatrix, name, scale), np.array([entry.divisor(0, entry.size) * chunk_size])


def _finite(values: Floats, name: str, path: str) -> Floats:
    import numpy as np

    if not np.isfinite(values).all():
        raise BadFile("importance that is not finite, or adds up to more than float32 holds", path=path, object=name)
    return values


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    chunk_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the GGUF form of a legacy file (or of a GGUF one), or the legacy form if the output's name ends in ".dat".

    chunk_size: tokens of a chunk, a legacy file's default is llama-imatrix's 512. The importance stays the same, bit
    for bit where chunk_size is a power of two; to legacy it is rounded once more, and the counts are lost. BadFile,
    BadPlan, OSError, OutOfSpace.
    """
    check_output([path], output, overwrite)
    _check_chunk_size(chunk_size)
    with open_imatrix(path) as imatrix:
        size = chunk_size or imatrix.chunk_size or CHUNK_SIZE
        if os.fsdecode(output).endswith(".dat"):
            if imatrix.of is not None:
                warnings.warn(
                    f"{imatrix.path}: the older format cannot say of which cut it is", SurgeryWarning, stacklevel=2
                )
            _write_legacy(imatrix, output, size, overwrite)
            return
        if imatrix.format == "gguf" and size != imatrix.chunk_size:
            raise BadPlan(
                "the chunk size of a GGUF file is known", object=CHUNK_SIZE_KEY, found=size, expected=imatrix.chunk_size
            )
        entries = {name: _raw(imatrix, name, size) for name in imatrix.entries}
        chunks = imatrix.chunk_count
        if imatrix.format == "legacy":
            chunks = max(int(counts[0]) for _, counts in entries.values()) // size
        write(
            output,
            entries,
            datasets=imatrix.datasets,
            chunk_count=chunks,
            chunk_size=size,
            of=imatrix.of,
            overwrite=overwrite,
        )


def _write_legacy(imatrix: Imatrix, output: str | os.PathLike[str], chunk_size: int, overwrite: bool) -> None:
    import numpy as np

    if imatrix.format == "legacy":
        raise BadPlan("a legacy file already", path=imatrix.path)
    entries = [e for e in imatrix.entries.values() if e.counts.any()]  # llama-imatrix leaves the others out
    most = max((int(e.counts.max()) for e in entries), default=0)
    dataset = name_bytes(imatrix.datasets[-1]) if imatrix.datasets else b""
    trailer = struct.pack("<ii", min(most // chunk_size, 2**31 - 1), len(dataset)) + dataset
    heads = []
    for entry in entries:
        calls = -(-int(entry.counts.max()) // chunk_size)
        if max(calls, entry.size) >= 2**31:
            raise BadPlan("too large for the legacy format", object=entry.name)
        name = name_bytes(entry.name)
        heads.append((calls, struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, entry.size)))
    if not entries:
        raise BadPlan("an importance matrix without entries", path=imatrix.path)
    total = 4 + sum(len(head) + 4 * e.size for e, (_, head) in zip(entries, heads, strict=True)) + len(trailer)
    with Sink(os.fsdecode(output), total, overwrite=overwrite) as sink:
        sink.write_at(0, struct.pack("<i", len(entries)))
        at = 4
        for entry, (calls, head) in zip(entries, heads, strict=True):
            sink.write_at(at, head)
            at += len(head)
            part = entry.size // len(entry.counts)
            done = 0
            for piece in imatrix.pieces(entry.name):
                counts = entry.counts[np.arange(done, done + piece.size) // part]
                value = np.divide(piece, counts, out=np.ones_like(piece), where=counts > 0) * np.float32(calls)
                sink.write_at(at, value.astype("<f4"))
                done += piece.size
                at += value.nbytes
        imatrix.source.check_unchanged()
        sink.write_at(at, trailer)


def slice_experts(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    kept: Mapping[int, Iterable[int]] | Wanted,
    *,
    experts: int | None = None,
    overwrite: bool = False,
) -> list[int]:
    """Writes a copy for a model that keeps only some experts. Returns the layers of `kept` that have no entry.

    kept: layer -> ids of the experts to keep, as the importance matrix numbers them; a Keep that says of which model it
    is, or the cut of a model, is found in an importance matrix of any model of its chain of cuts. experts: how many
    there were, for a file with one count for all of them (legacy ones). Only entries of expert tensors (ffn_*_exps,
    ffn_*_chexps) change; the copy says of which cut it is. BadPlan: an id out of range or named twice, a layer with
    experts that `kept` lacks, a part of the experts that share a chunk expert, an importance matrix of no model of the
    chain; BadFile, OSError.
    """
    if experts is not None and experts < 1:
        raise BadPlan("not a number of experts", object="experts", found=experts)
    check_output([path], output, overwrite)
    with open_imatrix(path) as imatrix:
        layers = _experts(imatrix)
        if not layers:
            raise BadPlan("an importance matrix without experts", path=imatrix.path)
        numbers = {layer: experts or number for layer, number in layers.items()}
        kept, of = _found(imatrix, kept, numbers, experts is not None)
        if missing := [layer for layer in layers if layer not in kept]:
            raise BadPlan(
                f"layer {missing[0]} is missing",
                path=imatrix.path,
                object="kept",
                expected=f"the {len(layers)} layers with experts",
            )
        chunk_size = imatrix.chunk_size or CHUNK_SIZE
        entries = {}
        for name, entry in imatrix.entries.items():
            sums, counts = _raw(imatrix, name, chunk_size)
            layer, axis = _expert_axis(name)
            if axis is not None and layer in layers:
                number = numbers[layer]
                if number == 1 and experts is None:
                    raise _one_count(imatrix, name)
                ids = _check_ids(name, kept[layer], number)
                if axis == "groups":
                    ids, number = _chunk_ids(name, ids, number, len(counts)), len(counts)
                if entry.size % number or len(counts) not in (1, number):
                    raise BadPlan(
                        "another number of experts",
                        path=imatrix.path,
                        object=name,
                        found=f"{entry.size} sums, {len(counts)} counts",
                        expected=number,
                    )
                sums, counts = _cut(sums, counts, ids, number)
            entries[name] = sums, counts
        write(
            output,
            entries,
            datasets=imatrix.datasets,
            chunk_count=imatrix.chunk_count,
            chunk_size=chunk_size,
            of=of,
            overwrite=overwrite,
        )
    return [layer for layer in kept if layer not in layers]


def _one_count(imatrix: Imatrix, name: str) -> BadPlan:
    return BadPlan(
        "one count for all experts: it does not say how many there are",
        path=imatrix.path,
        object=name,
        hint="experts= (--experts N)",
    )


def _found(
    imatrix: Imatrix, kept: Mapping[int, Iterable[int]] | Wanted, numbers: Mapping[int, int], given: bool
) -> tuple[Mapping[int, Iterable[int]], Subject | None]:
    """The ids of the experts to keep as the importance matrix numbers them, and what it is of when it is cut to them.
    numbers: of the experts of its layers; given: the caller has said how many there are."""
    if isinstance(kept, Keep) and kept.of is not None:
        kept = Wanted.of_choice(kept, kept.of)
    number = max(numbers.values())
    if not isinstance(kept, Wanted):
        ids = {layer: tuple(some) for layer, some in kept.items()}
        cut = {layer: ids[layer] for layer in numbers if layer in ids}
        return ids, (imatrix.of or Subject(number)).after_cut(cut)
    if number == 1 and not given:
        raise _one_count(imatrix, next(name for name in imatrix.entries if _expert_axis(name)[1] == "experts"))
    try:
        ways = _readings(imatrix, kept, number)
        found = [(have.places(wish), have.same_layers(wish)) for have, wish in ways]
        # Of two models whose layers alone were dropped, that one which has all layers of the importance matrix.
        found = [way for way in found if numbers.keys() <= way[0].keys()] or found
        if any(places != found[0][0] for places, _ in found):
            raise BadPlan(
                "of which model of the chain of cuts is not known: two have as many experts",
                hint="slice it by each cut, one after the other",
            )
    except BadPlan as error:
        error.path = imatrix.path
        raise
    return found[0][0], kept.model if found[0][1] else None


def _readings(imatrix: Imatrix, wanted: Wanted, number: int) -> list[tuple[Descent, Descent]]:
    """In which numbers the cut can be found in an importance matrix: pairs of what that has and what is wanted, both by
    the ids of one model. Where it does not say what it is of, its number of experts does."""
    cut, origin, of = wanted.cut, wanted.model.origin, imatrix.of
    if of is not None and of.is_known_as(cut.header_sha256):
        return [(Descent(), cut)]
    have = Descent() if of is None else of.origin
    if have.header_sha256 and have.experts and origin.experts and have.experts != origin.experts:
        raise BadPlan(
            "the importance matrix is of another model", object="experts", found=have.experts, expected=origin.experts
        )
    number = have.experts or number
    wishes = [origin] if have.header_sha256 else [wish for wish in (origin, cut) if wish.experts == number]
    wishes = wishes or [wish for wish in (origin, cut) if wish.experts is None]
    if not wishes:
        known = [f"{cut.experts} as in the model's source"]
        if origin.experts != cut.experts:
            known.append(f"{origin.experts} as in the first model of its chain")
        raise BadPlan("another number of experts", object="experts", found=number, expected=either(known))
    if wishes[0].experts is None:
        warnings.warn(
            f"{imatrix.path}: taken to be of the file that the model was first cut from: an older version cut it, and "
            "did not say how many experts there were",
            SurgeryWarning,
            stacklevel=4,
        )
    return [(have, wish) for wish in wishes]


def _expert_axis(name: str) -> tuple[int, str | None]:
    """(layer, "experts" or "groups") of a matrix of experts or of chunk experts, (-1, None) of any other tensor."""
    layer, rule = layer_of(name), expert_rule(name)
    return (layer, rule.axis) if layer is not None and rule is not None and rule.ndim == 3 else (-1, None)


def _experts(imatrix: Imatrix) -> dict[int, int]:
    """layer -> number of experts, for the layers with expert entries; 1 where all of them share one count."""
    layers: dict[int, int] = {}
    for name, entry in imatrix.entries.items():
        layer, axis = _expert_axis(name)
        if axis == "experts":
            layers[layer] = max(len(entry.counts), layers.get(layer, 1))
    return layers


def _check_ids(name: str, ids: Iterable[int], experts: int) -> list[int]:
    ids = sorted(ids)
    if not ids:
        raise BadPlan("no expert is kept", object=name)
    for i, expert in enumerate(ids):
        if not 0 <= expert < experts:
            raise BadPlan(
                f"expert {expert} out of range", object=name, found=f"{experts} experts", expected=f"0..{experts - 1}"
            )
        if i and ids[i - 1] == expert:
            raise BadPlan(f"expert {expert} named twice", object=name)
    return ids


def _chunk_ids(name: str, ids: list[int], experts: int, chunks: int) -> list[int]:
    """The chunk experts of the kept ones: those of a chunk stay or go together."""
    if experts % chunks:
        raise BadPlan(
            "experts do not divide into chunks", object=name, found=chunks, expected=f"a divisor of {experts}"
        )
    size, have = experts // chunks, set(ids)
    chosen = [c for c in range(chunks) if c * size in have]
    if have != {c * size + i for c in chosen for i in range(size)}:
        raise BadPlan("experts that share one chunk expert and only some of them are kept", object=name)
    return chosen


def _cut(sums: Sums, counts: Counts, ids: list[int], experts: int) -> tuple[Sums, Counts]:
    """The sums and counts of some experts."""
    size, pieces = sums
    part = size // experts
    wanted = set(ids)

    def cut() -> Iterator[Floats]:
        at = 0
        for piece in pieces():  # a piece may begin and end inside an expert
            for expert in range(at // part, -(-(at + piece.size) // part)):
                if expert in wanted:
                    yield piece[max(0, expert * part - at) : (expert + 1) * part - at]
            at += piece.size

    return (part * len(ids), cut), counts if len(counts) == 1 else counts[ids]


def coverage(imatrix: Imatrix) -> dict[str, Any]:
    """What an importance matrix has seen, ready for JSON: "path", "format", "datasets", "chunk_count", "chunk_size",
    "warnings", "model": the one that it says it is of, or null, "entries": [{"name", "size", "rows", "least", "most"}]
    (rows are counts of their own, least and most of the tokens that were counted), "layers": [{"layer", "experts",
    "seen", "least", "most", "never", "tokens"}], never being the ids of the experts that no token reached, tokens those
    of each expert (the least of its tensors). A legacy file has lost the counts: "least" and "most" are null there, and
    layers whose experts share one count are left out.
    """
    layers = []
    for layer, experts in sorted(_experts(imatrix).items()):
        if experts == 1:
            continue
        counts = [
            e.counts
            for name, e in imatrix.entries.items()
            if _expert_axis(name) == (layer, "experts") and len(e.counts) == experts
        ]
        tokens = [min(int(c[i]) for c in counts) for i in range(experts)]
        never = [i for i, n in enumerate(tokens) if n == 0]
        layers.append(
            {
                "layer": layer,
                "experts": experts,
                "seen": experts - len(never),
                "least": min(tokens),
                "most": max(int(c.max()) for c in counts),
                "never": never,
                "tokens": tokens,
            }
        )
    entries = [
        {
            "name": e.name,
            "size": e.size,
            "rows": len(e.counts),
            "least": None if e.legacy else int(e.counts.min()),
            "most": None if e.legacy else int(e.counts.max()),
        }
        for e in imatrix.entries.values()
    ]
    return {
        "path": imatrix.path,
        "format": imatrix.format,
        "datasets": list(imatrix.datasets),
        "chunk_count": imatrix.chunk_count,
        "chunk_size": imatrix.chunk_size,
        "entries": entries,
        "layers": layers,
        "warnings": list(imatrix.warnings),
        "model": None if imatrix.of is None else imatrix.of.to_json(),
    }
