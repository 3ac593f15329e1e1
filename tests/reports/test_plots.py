"""The picture of a choice of experts."""

import sys

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from pygguf_surgery.reports.plots import importance
from support import moe_models


def pixels(png):
    from io import BytesIO

    image = pytest.importorskip("matplotlib.image")
    return image.imread(BytesIO(png), format="png")


def test_the_picture_shows_which_experts_stay(tmp_path):
    pytest.importorskip("matplotlib")
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf")) as model:
        ranking = pgs.experts.rank(model)
        few, many = (pixels(importance(ranking.keep(n))) for n in (2, 15))
        again = pixels(importance(ranking.keep(2)))
    assert few.shape[2] == 4 and few.shape[0] > 200 and few.shape[1] > 500
    assert np.array_equal(few, again) and few.shape == many.shape and not np.array_equal(few, many)


def test_scores_below_zero_and_many_layers(tmp_path):
    pytest.importorskip("matplotlib")
    from pygguf_surgery.experts import Keep

    rng = np.random.default_rng(0)
    keep = Keep(
        {layer: tuple(range(0, 512, 2)) for layer in range(94)},
        "aimer",
        scores={layer: -rng.random(512) for layer in range(94)},
    )
    assert pixels(importance(keep)).shape[0] > 1000


def test_from_the_shell(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, plot = str(moe_models.qwen3moe(tmp_path / "in.gguf")), str(tmp_path / "importance.png")
    assert main(["plan", path, "--keep", "8", "--plot", plot]) == 0
    assert (tmp_path / "importance.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["plan", path, "--keep", "8", "--plot", plot]) == 4 and "--force" in capsys.readouterr().err
    assert main(["plan", path, "--keep", "8", "--plot", plot, "--force"]) == 0
    assert main(["plan", path, "--plot", plot]) == 2
    (tmp_path / "kept.json").write_text('{"kept": {"0": [0, 1, 2, 3], "1": [0, 1, 2, 3]}}')
    assert main(["plan", path, "--by", str(tmp_path / "kept.json"), "--plot", plot, "--force"]) == 4


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("pygguf_surgery.studies.scoring.rank", lambda *_, **__: pytest.fail("weights were read"))
    path = str(moe_models.qwen3moe(tmp_path / "in.gguf"))
    assert main(["prune", path, str(tmp_path / "o.gguf"), "--keep", "8", "--plot", str(tmp_path / "a.PNG")]) == 4
    assert "pygguf-surgery[report]" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
    with pgs.open(path) as model, pytest.raises(pgs.Unsupported, match=r"pygguf-surgery\[report\]"):
        importance(pgs.experts.rank(model).keep(4))
