"""Errors are fields; their text is composed from them, and both survive a pickle."""

import copy
import errno
import pickle

import pytest

from pygguf_surgery import BadFile, BadPlan, OutOfSpace, SourceChanged, SurgeryError, Unsupported

FIELDS = dict(path="a.gguf", object="blk.0.x", offset=24, found=3, expected="at most 2", hint="try this")


@pytest.mark.parametrize("kind", [SurgeryError, BadFile, BadPlan, Unsupported, SourceChanged, OutOfSpace])
def test_fields_and_text(kind):
    error = kind("too many", **FIELDS)
    assert isinstance(error, SurgeryError) and {name: getattr(error, name) for name in FIELDS} == FIELDS
    assert str(error) == "a.gguf: blk.0.x: too many (found 3, expected at most 2, at byte 24); try this"
    assert str(kind("too many")) == "too many"
    assert str(kind("too many", found=0)) == "too many (found 0)"


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", [BadFile("x", **FIELDS), OutOfSpace("x", errno=errno.ENOSPC, **FIELDS)])
def test_pickle_and_copy_keep_every_field(error, twin):
    other = twin(error)
    assert type(other) is type(error) and other is not error and str(other) == str(error)
    assert {name: getattr(other, name) for name in FIELDS} == FIELDS
    assert getattr(other, "errno", None) == getattr(error, "errno", None)


def test_out_of_space_is_an_os_error_too():
    error = OutOfSpace("the disk is full", errno=errno.ENOSPC)
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC
