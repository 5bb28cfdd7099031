// Loads a SavedModel and runs a signature, like TensorFlow Serving.
//
//   serve FOLDER SIGNATURE FILE...
//
// Each file contains one element of the batch: its bytes for a string input, or float32 values otherwise.
// Prints the names of the best classes, one line per file.

#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "tensorflow/cc/saved_model/loader.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/public/session.h"

namespace {

std::string Read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << path << '\n';
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void Check(const absl::Status& status) {
  if (!status.ok()) {
    std::cerr << status.ToString() << '\n';
    std::exit(1);
  }
}

tensorflow::Tensor MakeBatch(const tensorflow::TensorInfo& info, const std::vector<std::string>& elements) {
  tensorflow::TensorShape shape({static_cast<int64_t>(elements.size())});
  for (int axis = 1; axis < info.tensor_shape().dim_size(); ++axis) {
    shape.AddDim(info.tensor_shape().dim(axis).size());
  }
  tensorflow::Tensor batch(info.dtype(), shape);
  if (info.dtype() == tensorflow::DT_STRING) {
    for (size_t i = 0; i < elements.size(); ++i) batch.flat<tensorflow::tstring>()(i) = elements[i];
    return batch;
  }
  const size_t bytes = batch.TotalBytes() / elements.size();
  for (size_t i = 0; i < elements.size(); ++i) {
    if (info.dtype() != tensorflow::DT_FLOAT || elements[i].size() != bytes) {
      std::cerr << "a file must hold " << bytes << " bytes of float32, not " << elements[i].size() << '\n';
      std::exit(2);
    }
    std::memcpy(static_cast<char*>(batch.data()) + i * bytes, elements[i].data(), bytes);
  }
  return batch;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: serve FOLDER SIGNATURE FILE...\n";
    return 2;
  }
  std::vector<std::string> elements;
  for (int i = 3; i < argc; ++i) elements.push_back(Read(argv[i]));

  tensorflow::SavedModelBundle bundle;
  Check(tensorflow::LoadSavedModel({}, {}, argv[1], {"serve"}, &bundle));
  const auto found = bundle.GetSignatures().find(argv[2]);
  if (found == bundle.GetSignatures().end()) {
    std::cerr << "no signature " << argv[2] << '\n';
    return 2;
  }
  const auto& signature = found->second;
  const auto& input = signature.inputs().begin()->second;
  std::vector<tensorflow::Tensor> outputs;
  Check(bundle.GetSession()->Run({{input.name(), MakeBatch(input, elements)}},
                                 {signature.outputs().at("labels").name()}, {}, &outputs));
  const auto labels = outputs.at(0).matrix<tensorflow::tstring>();
  for (int64_t row = 0; row < labels.dimension(0); ++row) {
    for (int64_t place = 0; place < labels.dimension(1); ++place) {
      std::cout << (place ? "\t" : "") << std::string(labels(row, place));
    }
    std::cout << '\n';
  }
}
