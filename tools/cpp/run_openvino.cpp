// Runs an exported OpenVINO model in C++, and says how far its outputs are from those of Python.
//
//     run_openvino MODEL.xml FOLDER
//
// FOLDER holds, one after another and without any header,
//   INPUT.u8    images as a camera gives them, pixel by pixel its channels (RGB, grey), of the size that it takes;
//               or INPUT.f32, the same values in 0..255 as float32. Most models have one input, which is called image.
//   OUTPUT.f32  what Python said to them, float32; of a head among several, HEAD/OUTPUT.f32.
// The exit code is 0 where all outputs are within the limits of the model's precision, 1 where not, 2 for an error.
// What is done here to images, types and layouts is put into the graph: a line only hands over bytes.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

using Bytes = std::vector<char>;

Bytes read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path.string());
    return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// What the model says of itself, see dinov2/deploy/artefact.py: JSON, of which a few plain values are needed here.
struct Description {
    std::string text;

    std::string find(const std::string& key, const std::string& pattern) const {
        std::smatch found;
        if (!std::regex_search(text, found, std::regex("\"" + key + "\": " + pattern)))
            throw std::runtime_error("the model does not say its " + key + ": dinov2 export did not write it");
        return found[1];
    }
    std::vector<float> of_channels(const std::string& key) const {
        const std::regex number("[-+.0-9e]+");
        const std::string list = find(key, "\\[([-+.0-9e, ]+)\\]");
        std::vector<float> values;
        for (std::sregex_iterator one(list.begin(), list.end(), number), end; one != end; ++one)
            values.push_back(255 * std::stof(one->str()));  // of values in 0..255
        return values;
    }
};

struct Input {
    Bytes bytes;            // of all images
    ov::element::Type type;  // of their values
    size_t size = 0;         // bytes of one image
};

// How an output differs, and whether that is within the limits that dinov2/deploy/standalone.py has.
bool compare(const std::string& name, const std::vector<float>& found, const Bytes& bytes, const std::string& kind) {
    static const std::map<std::string, double> least{{"fp32", 0}, {"fp16", 0.9999}, {"bf16", 0.999}, {"int8", 0.99}};
    std::vector<float> expected(bytes.size() / sizeof(float));
    std::memcpy(expected.data(), bytes.data(), expected.size() * sizeof(float));
    if (expected.empty() || expected.size() != found.size())
        throw std::runtime_error(name + " has " + std::to_string(found.size()) + " values, and its file " +
                                 std::to_string(expected.size()));
    const double count = static_cast<double>(expected.size());
    double mean = 0, largest = 0, difference = 0, first = 0, second = 0, both = 0;
    for (float value : expected) mean += value / count;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!std::isfinite(found[i])) throw std::runtime_error(name + " has values that are not finite");
        const double one = expected[i] - mean, other = found[i] - mean;
        largest = std::max(largest, std::fabs(static_cast<double>(expected[i])));
        difference = std::max(difference, std::fabs(one - other));
        first += one * one, second += other * other, both += one * other;
    }
    const double deviation = std::sqrt(first / count), lengths = std::sqrt(first * second);
    const double rounding = 16 * std::numeric_limits<float>::epsilon() * largest;
    const double cosine = lengths > 0 ? both / lengths : static_cast<double>(difference <= rounding);
    const double most = kind == "fp32" ? 2e-4 * deviation + rounding : std::numeric_limits<double>::infinity();
    const bool passed = cosine >= least.at(kind) && difference <= most;
    std::printf("%s: cosine %.7f, largest difference %.3g (standard deviation %.3g): %s\n", name.c_str(), cosine,
                difference, deviation, passed ? "passed" : "FAILED");
    return passed;
}

int run(const std::string& path, const std::filesystem::path& folder) {
    ov::Core core;
    const std::shared_ptr<ov::Model> model = core.read_model(path);
    if (!model->has_rt_info("dinov2")) throw std::runtime_error(path + " was not written by dinov2 export");
    const Description description{model->get_rt_info<std::string>("dinov2")};
    const std::string precision = description.find("precision", "\"([a-z0-9]+)\"");
    const bool pixels = description.find("pixels", "(true|false)") == "true";  // then the model normalises them itself

    ov::preprocess::PrePostProcessor steps(model);
    std::map<std::string, Input> inputs;
    size_t images = 0;
    for (const auto& port : model->inputs()) {
        const std::string name = port.get_any_name();
        const bool is_bytes = std::filesystem::exists(folder / (name + ".u8"));
        Input& input = inputs[name];
        input.bytes = read(folder / (name + (is_bytes ? ".u8" : ".f32")));
        input.type = is_bytes ? ov::element::u8 : ov::element::f32;
        const ov::PartialShape shape = port.get_partial_shape();  // B C H W, of which B may be any
        input.size = shape[1].get_length() * shape[2].get_length() * shape[3].get_length() * input.type.size();
        if (input.bytes.empty() || input.bytes.size() % input.size)
            throw std::runtime_error(name + ": not whole images of " + std::to_string(input.size) + " bytes each");
        images = input.bytes.size() / input.size;
        steps.input(name).tensor().set_element_type(input.type).set_layout("NHWC");
        steps.input(name).model().set_layout("NCHW");
        auto& done = steps.input(name).preprocess().convert_element_type(ov::element::f32);
        if (!pixels) done.mean(description.of_channels("mean")).scale(description.of_channels("std"));
    }
    const ov::Dimension rows = model->inputs()[0].get_partial_shape()[0];
    const size_t batch = rows.is_dynamic() ? images : rows.get_length();
    // Left to itself, OpenVINO rounds float32 where a processor has bfloat16.
    const auto type = precision == "bf16" ? ov::element::bf16 : ov::element::f32;
    ov::CompiledModel compiled = core.compile_model(steps.build(), "CPU", ov::hint::inference_precision(type));
    ov::InferRequest request = compiled.create_infer_request();

    std::map<std::string, std::vector<float>> outputs;
    double milliseconds = 0;
    for (size_t start = 0; start < images; start += batch) {
        for (const auto& port : compiled.inputs()) {
            const Input& input = inputs.at(port.get_any_name());
            if (input.bytes.size() != images * input.size) throw std::runtime_error("inputs are of different numbers");
            ov::Shape shape = port.get_partial_shape().get_min_shape();
            shape[0] = batch;
            ov::Tensor tensor(input.type, shape);
            for (size_t row = 0; row < batch; ++row)  // the last batch is filled up with its first image
                std::memcpy(static_cast<char*>(tensor.data()) + row * input.size,
                            input.bytes.data() + (start + row < images ? start + row : start) * input.size, input.size);
            request.set_tensor(port, tensor);
        }
        const auto before = std::chrono::steady_clock::now();
        request.infer();
        milliseconds += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - before).count();
        for (const auto& port : compiled.outputs()) {
            const ov::Tensor tensor = request.get_tensor(port);
            const size_t values = tensor.get_size() / batch * std::min(batch, images - start);
            std::vector<float>& output = outputs[port.get_any_name()];
            output.insert(output.end(), tensor.data<float>(), tensor.data<float>() + values);
        }
    }
    std::printf("%s, %s: %zu images of %zu at a time, %.2f ms each\n", ov::get_openvino_version().buildNumber,
                precision.c_str(), images, batch, milliseconds / static_cast<double>(images));
    bool passed = true;
    for (const auto& [name, values] : outputs)
        passed = compare(name, values, read(folder / (name + ".f32")), precision) && passed;
    return passed ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) {
        std::fprintf(stderr, "usage: run_openvino MODEL.xml FOLDER\n");
        return 2;
    }
    try {
        return run(words[1], words[2]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
