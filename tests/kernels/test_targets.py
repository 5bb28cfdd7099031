"""Tests of the description of a library and its key."""

import pytest
import tensorflow as tf

from keras_das.kernels import targets
from tests.kernels.stand_in import make_target, target_of


def retold(target, **changes):
    return target_of(target.sources, **changes).key


@pytest.mark.parametrize(
    "changes",
    [
        {"framework": "tensorflow"},
        {"version": "1.2.4"},
        {"abi": "0"},
        {"platform": "Linux aarch64"},
        {"flags": ("-std=c++17", "-O2", "-fPIC")},
        {"link_flags": ("-shared",)},
        {"units": (targets.Unit("answer.cc"), targets.Unit("half.cc", ("-DHALF=20",)))},
        {"units": (targets.Unit("answer.cc"),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_key_changes_with(target, changes):
    assert retold(target) == target.key
    assert retold(target, **changes) != target.key


@pytest.mark.parametrize("name", ["answer.h", "half.cc", "gpu/kernels.h"])
def test_key_changes_with_the_text_of(target, name):
    (target.sources / "gpu").mkdir()
    (target.sources / "gpu" / "kernels.h").touch()
    before = retold(target)
    (target.sources / name).write_text((target.sources / name).read_text() + "\n")
    assert retold(target) != before


def test_key_does_not_depend_on_where_things_are_installed(target, tmp_path):
    flags, links = (*target.flags, "-I/here/include"), (*target.link_flags, "-L/here")
    elsewhere = make_target(tmp_path / "elsewhere", flags=flags, link_flags=links)
    assert elsewhere.key == target.key


@pytest.mark.parametrize("framework", targets.FRAMEWORKS)
def test_units_exist_and_each_is_compiled_once(framework):
    target = targets.target(framework)
    assert len(set(target.units)) == len({str(unit) for unit in target.units}) == len(target.units)
    assert all((target.sources / unit.source).is_file() for unit in target.units)
    has_xla_ops = framework == "tensorflow" and not targets.xla_problem()
    assert ("xla_ops.cc" in {unit.source for unit in target.units}) == has_xla_ops


def test_tensorflow_without_the_header_of_xla(monkeypatch, tmp_path):
    """As TensorFlow 2.18 and 2.19 are: the library has no binding for XLA."""
    monkeypatch.setattr(tf.sysconfig, "get_include", lambda: str(tmp_path))
    monkeypatch.setattr(targets, "xla_problem", targets.xla_problem.__wrapped__)
    assert "lacks the header xla/ffi/api/ffi.h" in targets.xla_problem()
    target = targets.target("tensorflow")
    assert {unit.source for unit in target.units} >= {"tf_ops.cc", "cpu/kernels.cc"}
    assert not {unit.source for unit in target.units} & {"xla_ops.cc", "ffi.cc"}
    (tmp_path / "xla" / "ffi" / "api").mkdir(parents=True)
    (tmp_path / "xla" / "ffi" / "api" / "ffi.h").touch()
    assert {"xla_ops.cc", "ffi.cc"} < {unit.source for unit in targets.target("tensorflow").units}
