"""What the tests of the shell share."""

import pytest

from pygguf_surgery.cli import main
from pygguf_surgery.cli.commands.demo_model import write_demo_model
from support.small_model import SMALL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "small.gguf"
    write_demo_model(path, shape=SMALL)
    return str(path)


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr)"""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
