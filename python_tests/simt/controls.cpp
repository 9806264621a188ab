#include "simt/controls.h"

#include <cstdint>
#include <string>

#include "simt/simt.h"

namespace py = pybind11;

namespace simt {

namespace {

Order order_of(const std::string& name) {
  if (name == "forward") {
    return Order::kForward;
  }
  if (name == "reverse") {
    return Order::kReverse;
  }
  if (name == "shuffled") {
    return Order::kShuffled;
  }
  throw py::value_error("order must be forward, reverse or shuffled, got " + name);
}

py::dict counters_by_name() {
  const Counters counted = counters();
  py::dict by_name;
  by_name["launches"] = counted.launches;
  by_name["blocks"] = counted.blocks;
  by_name["switches"] = counted.switches;
  by_name["static_shared_bytes"] = counted.static_shared_bytes;
  by_name["dynamic_shared_bytes"] = counted.dynamic_shared_bytes;
  return by_name;
}

}  // namespace

void bind_controls(py::module_& m) {
  using py::arg;
  using no_gil = py::call_guard<py::gil_scoped_release>;  // they wait for a launch of another thread
  m.def(
      "set_order", [](const std::string& name, uint64_t seed) { set_order(order_of(name), seed); }, arg("order"),
      arg("seed") = 0, "The order of threads and blocks: forward, reverse or shuffled.", no_gil());
  m.def("set_multiprocessors", &set_multiprocessors, arg("count"), no_gil());
  m.def("set_shared_memory_limit", &set_shared_memory_limit, arg("block_bytes"), no_gil());
  m.def("reset", &reset, "Settings and counters as at the start.", no_gil());
  m.def("counters", &counters_by_name, "What was launched since the last reset().");
}

}  // namespace simt
