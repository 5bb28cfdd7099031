"""Tests of exports of half-precision and quantized models: they run, or the error names the precision."""

import keras
import numpy as np
import pytest

import keras_das
from tests.exporters.test_litert import run as run_litert
from tests.exporters.test_onnx import run_only as run_onnx

# bfloat16 has 8 significant bits and float16 has 11. The exported model computes in float32.
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-6}
RUN = {"onnx": run_onnx, "litert": run_litert}


def build(dtype, *layers):
    layers = [keras.layers.Conv2D(4, 1, dtype=dtype), *layers, keras.layers.Dense(3, dtype=dtype)]
    return keras.Sequential([keras.Input((4, 4, 3), name="image", dtype="float32"), *layers])


def export_and_compare(model, path, rng, tolerance):
    format = {".onnx": "onnx", ".tflite": "litert"}[path.suffix]
    policies = [layer.dtype_policy.name for layer in model.layers]
    keras_das.export(model, path, format=format)
    assert [layer.dtype_policy.name for layer in model.layers] == policies
    images = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    wanted = keras.ops.convert_to_numpy(keras.ops.cast(model(images), "float32"))
    found = RUN[format](path, images)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    return found.dtype


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_litert_computes_in_float32(policy, tmp_path, rng):
    tolerance = TOLERANCES[policy.removeprefix("mixed_")]
    dtype = export_and_compare(build(policy), tmp_path / "model.tflite", rng, tolerance)
    assert dtype == "float32"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_onnx_computes_in_float32_for_bfloat16(policy, tmp_path, rng):
    assert (
        export_and_compare(build(policy), tmp_path / "model.onnx", rng, TOLERANCES["bfloat16"]) == "float32"
    )


def test_onnx_keeps_float16(tmp_path, rng):
    assert export_and_compare(build("mixed_float16"), tmp_path / "model.onnx", rng, 4e-3) == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_gates_in_bfloat16(suffix, tmp_path, rng):
    keras.utils.set_random_seed(0)
    model = build("mixed_bfloat16", keras_das.DASLayer(reduction=0.5, dtype="mixed_bfloat16"))
    export_and_compare(model, (tmp_path / "model").with_suffix(suffix), rng, 5e-2)


def test_policies_come_back_after_an_error(tmp_path, monkeypatch):
    model = build("mixed_bfloat16")

    def disk_full(*arguments, **options):
        assert [layer.compute_dtype for layer in model.layers] == ["float32", "float32"]
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "export", disk_full)
    with pytest.raises(OSError, match="No space left"):
        keras_das.export(model, tmp_path / "model.tflite", format="litert")
    assert [layer.compute_dtype for layer in model.layers] == ["bfloat16", "bfloat16"]


def dense(mode):
    layer = keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((8,)), layer])
    layer.quantize(mode)
    return model


@pytest.mark.parametrize(
    ("mode", "format", "names"),
    [
        ("int8", "litert", r"operand #0 must be .* float .*, but got .* The model computes in int8,"),
        ("float8", "litert", r"Unsupported type.* The model computes in .*float8_e4m3fn"),
        ("float8", "onnx", r"float8_e4m3fn.* The model computes in .*float8_e4m3fn"),
    ],
)
def test_the_error_names_the_precision(mode, format, names, tmp_path):
    path = (tmp_path / "model").with_suffix({"litert": ".tflite", "onnx": ".onnx"}[format])
    with pytest.raises(
        ValueError, match=rf"cannot be written as (LiteRT|ONNX): .*{names}.*policy \"float32\""
    ):
        keras_das.export(dense(mode), path, format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_cast_that_the_model_makes_is_named(tmp_path):
    """The exporter changes the dtype policies of layers, but not casts inside them."""

    def square(x):
        half = keras.ops.cast(x, "bfloat16")
        return keras.ops.matmul(half, half)

    model = keras.Sequential([keras.Input((3, 3)), keras.layers.Lambda(square)])
    with pytest.raises(ValueError, match=r"cannot be written as LiteRT: .* The model computes in bfloat16,"):
        keras_das.export(model, tmp_path / "model.tflite", format="litert")
