// _runtime: builds and inspects programs from Python, and rounds weights for compression. Tensors
// arrive as addresses, so that no torch header is needed and one binary serves every torch release.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/tensor.h"
#include "executor.h"
#include "rounding.h"

namespace py = pybind11;
using namespace narrowcast;

namespace {

// (address, index into DTYPES, sizes, strides in elements), or None for an argument that was not
// given.
TensorView tensor_view(const py::handle& object) {
  TensorView v;
  if (object.is_none()) return v;
  const auto t = py::reinterpret_borrow<py::tuple>(object);
  v.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  v.dtype = static_cast<DType>(t[1].cast<int>());
  const auto sizes = t[2].cast<std::vector<int64_t>>(), strides = t[3].cast<std::vector<int64_t>>();
  if (sizes.size() > kMaxRank) throw std::runtime_error("tensors must have at most 8 dimensions");
  v.rank = static_cast<int>(sizes.size());
  for (int d = 0; d < v.rank; ++d) v.sizes[d] = sizes[d], v.strides[d] = strides[d];
  return v;
}

StepSpec step_spec(const std::string& op, const py::list& inputs, const std::vector<bool>& constant,
                   const py::list& outputs, const py::dict& attributes) {
  StepSpec spec;
  spec.op = op;
  for (const auto& t : inputs) spec.inputs.push_back(tensor_view(t));
  spec.constant = constant;
  for (const auto& t : outputs) spec.outputs.push_back(tensor_view(t));
  for (const auto& [key, value] : attributes) {
    auto& slot = spec.attributes[key.cast<std::string>()];
    if (py::isinstance<py::bool_>(value))
      slot = value.cast<bool>();
    else if (py::isinstance<py::int_>(value))
      slot = value.cast<int64_t>();
    else if (py::isinstance<py::float_>(value))
      slot = value.cast<double>();
    else if (py::isinstance<py::str>(value))
      slot = value.cast<std::string>();
    else
      slot = value.cast<std::vector<int64_t>>();
  }
  return spec;
}

Step callback(const std::string& node, py::function function) {
  return [node, function = std::move(function)] {
    py::gil_scoped_acquire gil;
    try {
      function();
    } catch (py::error_already_set& error) {
      const std::string text = "node " + node + ": " + std::string(py::str(error.value()));
      py::raise_from(error, PyExc_RuntimeError, text.c_str());
      throw py::error_already_set();
    }
  };
}

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// The caller (compress/gptq.py) has checked shapes and dtypes.
RoundedLayer rounded_layer(int64_t rows, int64_t columns, int64_t group, int low, int high,
                           bool zero_point, bool half, uintptr_t weight, uintptr_t scale,
                           uintptr_t offset, uintptr_t codes) {
  return {rows,
          columns,
          group,
          low,
          high,
          zero_point,
          half,
          address<const float>(weight),
          address<float>(scale),
          address<float>(offset),
          address<int8_t>(codes)};
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "narrowcast's step loop";
  m.attr("DTYPES") = py::make_tuple("float32", "float16", "bfloat16", "float64", "int8", "uint8",
                                    "int32", "int64", "bool");
  m.def("has_native", &Program::has_native);
  m.def("buffer_bytes", &Program::buffer_bytes);
  py::class_<PackCache>(m, "PackCache")
      .def(py::init<>())
      .def_property_readonly("bytes", &PackCache::bytes);
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("__len__", &Program::size)
      .def(
          "add_native",
          [](Program& p, const std::string& node, const std::string& op, py::list inputs,
             std::vector<bool> constant, py::list outputs, py::dict attributes, PackCache& packed) {
            return p.add_native(node, step_spec(op, inputs, constant, outputs, attributes), packed);
          })
      .def(
          "replace_native",
          [](Program& p, int64_t index, const std::string& op, py::list inputs,
             std::vector<bool> constant, py::list outputs, py::dict attributes, PackCache& packed) {
            p.replace_native(index, step_spec(op, inputs, constant, outputs, attributes), packed);
          })
      .def("add_callback",
           [](Program& p, const std::string& node, py::function f) {
             return p.add_callback(node, callback(node, std::move(f)));
           })
      .def("replace_callback",
           [](Program& p, int64_t index, const std::string& node, py::function f) {
             p.replace_callback(index, callback(node, std::move(f)));
           })
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>())
      .def("run_timed", [](const Program& p) {
        std::vector<double> seconds(p.size());
        py::gil_scoped_release release;
        p.run_timed(seconds);
        return seconds;
      });
  py::class_<RoundedLayer>(m, "RoundedLayer").def(py::init(&rounded_layer));
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def(
      "search_scales",
      [](const RoundedLayer& layer, uintptr_t importance) {
        search_scales(layer, address<const float>(importance));
      },
      without_gil);
  m.def(
      "round_in_order",
      [](const RoundedLayer& layer, uintptr_t order, uintptr_t feed) {
        round_in_order(layer, address<const int32_t>(order), address<const float>(feed));
      },
      without_gil);
  m.def(
      "refine",
      [](const RoundedLayer& layer, uintptr_t order, uintptr_t hessian, int64_t passes) {
        refine(layer, address<const int32_t>(order), address<const float>(hessian), passes);
      },
      without_gil);
}
