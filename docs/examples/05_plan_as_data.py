"""A plan is data: make it on one machine, check and run it on another: 05_plan_as_data.py MODEL.gguf PLAN.json OUT.gguf

Here both machines are this one. The plan knows its source by path and by the digest of its header.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pygguf_surgery as pgs

source, plan_file, out = sys.argv[1:]

# On the machine where the decision is made.
with pgs.open(source) as model:
    plan = pgs.Plan(model).keep_experts(pgs.experts.rank(model, by="aimer").keep(ratio=0.75)).quantize("MXFP4_MOE")
    Path(plan_file).write_text(plan.to_json(), encoding="utf-8")

# On the machine that writes the file. Its copy of the model may lie elsewhere.
with pgs.open(source) as model:
    plan = pgs.Plan.from_json(Path(plan_file).read_text(encoding="utf-8"), model)  # SourceChanged for another model
    checked = plan.check(memory="256MiB")
    for blocker in checked.blockers:  # errors with fields: object, found, expected, hint
        print(f"cannot be written: {blocker}", file=sys.stderr)
    if checked.blockers:
        sys.exit(4)
    report = checked.to_json()
    print(json.dumps({key: report[key] for key in ("file_bytes", "peak_memory_bytes", "warnings")}, indent=2))
    print(json.dumps(plan.write(out, memory="256MiB").to_json(), indent=2))
