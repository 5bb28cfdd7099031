#!/bin/sh
# Creates the environments of the alternatives, which cannot share one:
#
#   benchmarks/environments.sh [NAME ...]      default: onnxruntime openvino tfa torchvision
#
# Each is a venv of that name in $KERAS_DAS_BENCHMARK_ENVS (default benchmarks/.envs), 7 GB in all, most of it
# torchvision's: its wheels load beside the CUDA build of torch alone. $PYTHON (default python3) must be
# Python 3.11 for tfa, tensorflow-addons' last release being for TensorFlow 2.15, and 3.12 or newer for deformops.
# deformops, tvdcn and dcnv4 are for GPUs: pip compiles the last, with nvcc, for the torch that it finds. A peer without an
# environment runs in the one that bench_op.py is started from, if its package is there, and keras_das always does.
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
      deformops) packages='deformops==3.0.1' ;;
      tvdcn) packages='tvdcn==1.1.0' ;;
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
