"""Fetch the pinned ggml source: fetch.py CARRIER SHA256 VERSION TARGET

Downloads the source distribution CARRIER (NAME==VERSION) through pip, from whatever index pip is set up for, checks its
sha256, and unpacks from its vendored llama.cpp the files that the three translation units of quantizing include.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile

NEEDED = ("include/ggml.h", "include/ggml-alloc.h", "include/ggml-backend.h", "include/ggml-cpu.h", "include/gguf.h",
          "src/ggml.c", "src/ggml-quants.c", "src/ggml-quants.h", "src/ggml-common.h", "src/ggml-impl.h",
          "src/ggml-threading.cpp", "src/ggml-threading.h", "src/ggml-version.h.in", "src/ggml-cpu/ggml-cpu-impl.h")


def main(carrier: str, sha256: str, version: str, target: str) -> None:
    parent = os.path.dirname(target)
    with tempfile.TemporaryDirectory(prefix="pgs-ggml-") as folder:
        # --no-build-isolation: pip only has to read the metadata, with the scikit-build-core that is already here.
        if subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                           "--no-binary", ":all:", "--no-build-isolation", carrier, "-d", folder]).returncode:
            raise SystemExit(f"cannot download {carrier}, which carries the ggml source; without a package index give a "
                             "ggml tree of your own: pip install . -C cmake.define.PGS_GGML_SOURCE=DIR")
        archive = os.path.join(folder, os.listdir(folder)[0])
        with open(archive, "rb") as f:
            found = hashlib.sha256(f.read()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{carrier}: sha256 {found}, expected {sha256}")
        # Unpack beside the target and move at the end: two configures at once never see half a tree.
        staging = tempfile.mkdtemp(prefix=".ggml-", dir=parent)
        try:
            with tarfile.open(archive) as tar:
                root = tar.next().name.split("/")[0] + "/vendor/llama.cpp/"
                for member in tar:
                    name = member.name.removeprefix(root)
                    inside = name.removeprefix("ggml/")
                    if member.isfile() and (name == "LICENSE" or (inside != name and inside in NEEDED)):
                        path = os.path.join(staging, inside)
                        os.makedirs(os.path.dirname(path), exist_ok=True)
                        with tar.extractfile(member) as source, open(path, "wb") as out:
                            shutil.copyfileobj(source, out)
            open(os.path.join(staging, f".complete-{version}"), "w").close()
            os.chmod(staging, 0o755)
            if os.path.isdir(target):
                shutil.rmtree(target)
            try:
                os.rename(staging, target)
            except OSError:  # another configure was faster: its tree is the same
                if not os.path.exists(os.path.join(target, f".complete-{version}")):
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


main(*sys.argv[1:])
