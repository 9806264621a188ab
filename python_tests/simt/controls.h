// The stand-in's settings and counters, for tests in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace simt {

void bind_controls(pybind11::module_& m);

}  // namespace simt
