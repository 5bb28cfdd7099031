#!/bin/sh
# Creates the environments of the alternatives, which cannot share one:
#
#   benchmarks/environments.sh [NAME ...]      default: onnxruntime openvino tfa torchvision
#
# Each is a venv in $KERAS_DAS_BENCHMARK_ENVS (default benchmarks/.envs). They need 7 GB, mostly for torchvision, whose
# wheels require the CUDA build of torch. $PYTHON (default python3) must be Python 3.11 for tfa, because the last
# release of tensorflow-addons requires TensorFlow 2.15. dcnv4 is for GPUs: pip compiles it with nvcc for the installed
# torch. keras_das itself runs in the environment of bench_op.py.
set -eu

envs=${KERAS_DAS_BENCHMARK_ENVS:-$(dirname "$0")/.envs}
python=${PYTHON:-python3}

for name in "${@:-onnxruntime openvino tfa torchvision}"; do
  # Unquoted, because the default is a list of words.
  for peer in $name; do
    compiled=
    case $peer in
      onnxruntime) packages='onnxruntime==1.32.0 onnx' ;;
      openvino) packages='openvino==2026.4.1' ;;
      tfa) packages='tensorflow==2.15.1 tensorflow-addons==0.23.0' ;;
      torchvision) packages='torchvision==0.29.2' ;;
      dcnv4) packages='torch setuptools wheel ninja' compiled='DCNv4==1.0.0.post2' ;;
      *) echo "environments.sh: no peer is called '$peer'" >&2; exit 2 ;;
    esac
    echo "$envs/$peer: $packages $compiled"
    "$python" -m venv "$envs/$peer"
    # shellcheck disable=SC2086
    "$envs/$peer/bin/python" -m pip install --quiet $packages
    # Without isolation, to compile with the packages above.
    test -z "$compiled" || "$envs/$peer/bin/python" -m pip install --quiet --no-build-isolation "$compiled"
  done
done
