"""What each expression means: its output from the arrays of the source, in numpy."""

from __future__ import annotations

import numpy as np

from pygguf_surgery.plan_data.expressions import Copy, Merge, Remap, Repaired, Stack, Take


def merged(values, groups, axis):
    """The definition: c + sum w (x - c) over the members, in float32, one after the other."""
    out = []
    for group in groups:
        total = centroid = None
        for member, weight, order in zip(group.members, group.weights, group.orders, strict=True):
            x = values[member]
            if order:
                p = np.frombuffer(order, "<u2").astype(np.int64)
                if "half" in axis:
                    p = np.concatenate([p, p + len(p)])
                x = x[..., p] if axis.endswith("columns") else x[p] if axis.endswith("rows") else x
            if total is None:
                total = centroid = x
            else:
                total = total + np.float32(weight) * (x - centroid)
        out.append(total)
    return np.stack(out).astype(np.float32)


def taken(slices, ids, fill=0.0):
    """Slices of an array; a pad is one of `fill`."""
    return np.stack([np.full_like(slices[0], fill) if i is None else slices[i] for i in ids])


def remapped(table, old_to_new, substitutes):
    """Row after row, the experts of a token: those that stay first, then substitutes in the places of the others."""
    out = np.array([[-1 if old_to_new[i] is None else old_to_new[i] for i in row] for row in table.tolist()], np.int32)
    for row in out:
        for place in np.flatnonzero(row == -1):
            row[place] = next(new for new in substitutes if new not in row)
    return out


# Each takes the expression, the arrays of the model and those of the repair.
DEFINITIONS = {
    Copy: lambda e, model, repair: model[e.ref],
    Take: lambda e, model, repair: taken(model[e.ref], e.indices, e.fill),
    Stack: lambda e, model, repair: np.stack([model[ref] for ref in e.refs]),
    Remap: lambda e, model, repair: remapped(model[e.ref], e.table, e.substitutes),
    Repaired: lambda e, model, repair: taken(repair[e.ref], e.rows),
    Merge: lambda e, model, repair: merged(model[e.ref], e.groups, e.axis),
}


def evaluate(expression, model, repair):
    return DEFINITIONS[type(expression)](expression, model, repair)
