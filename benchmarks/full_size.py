"""The whole job on a full-size (sparse) file: full_size.py MODEL.gguf OUT.gguf --keep 256

Times info and plan, then the real run to MXFP4_MOE: peak RSS, and the page cache of input and output before and after,
with the first GiB of the input warmed beforehand. Some kernels reclaim idle pages by themselves (DAMON): a control file
of 1 GiB, warmed at the same time and left alone, shows how much of the loss is theirs.
"""

import argparse
import os

from common import MIB, SURGERY, cached_bytes, drop_cache, timed, warm

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--keep", type=int, default=256)
parser.add_argument("--memory", default="512MiB")
args = parser.parse_args()
job = ["--keep", str(args.keep), "--by", "router-norm", "--type", "MXFP4_MOE", "--memory", args.memory]
for label, command in {"info": ["info", args.model], "plan": ["plan", args.model, *job]}.items():
    runs = [timed([*SURGERY, *command]) for _ in range(3)]
    print(
        f"{label}: {', '.join(f'{s:.2f}' for s, _ in runs)} s, peak RSS {max(m for _, m in runs):.0f} MiB", flush=True
    )
control = args.out + ".control"
with open(control, "wb") as f:
    f.truncate(1 << 30)
drop_cache(args.model)
warm(args.model, 1 << 30)
warm(control, 1 << 30)
before = cached_bytes(args.model, 0, 1 << 30), cached_bytes(args.model, 1 << 30)
seconds, peak = timed([*SURGERY, "prune", args.model, args.out, *job, "--quiet", "--force"])
left = cached_bytes(control)
os.unlink(control)
after = cached_bytes(args.model, 0, 1 << 30), cached_bytes(args.model, 1 << 30)
size = os.path.getsize(args.out)
print(f"prune: {seconds:.1f} s, {size / 1e9:.2f} GB written, peak RSS {peak:.0f} MiB")
print(f"page cache, first GiB of the input: {before[0] / MIB:.1f} MiB before, {after[0] / MIB:.1f} after")
print(f"page cache, control file left alone:  1024.0 MiB before, {left / MIB:.1f} after")
print(f"page cache, rest of the input:      {before[1] / MIB:.1f} MiB before, {after[1] / MIB:.1f} after")
print(f"page cache, output:                 {cached_bytes(args.out) / MIB:.1f} MiB after")
