// The one file that knows pybind11: every op of ops.h, once for eager calls (pybind11: the shortest way in) and once
// for the dispatcher (torch.compile, opcheck). The module of the host stand-in (TAPS_SIMT) has the eager calls only,
// and the stand-in's controls.
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/extension.h>

#include <map>
#include <string>
#include <utility>

#include "ops.h"
#include "taps_build_info.h"

#if defined(TAPS_SIMT)
#include "simt/controls.h"
#endif

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info = TAPS_BUILD_INFO;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = std::to_string(__cplusplus);
  return info;
}

// pybind11 alone would turn a failed check into a RuntimeError with a C++ stack in it: say the sentence, as ValueError.
void translate_exception(std::exception_ptr pointer) {
  try {
    if (pointer) {
      std::rethrow_exception(pointer);
    }
  } catch (const c10::ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

// The table of ops, in decode-step order: the dispatcher's schema, and the function of ops.h. A row is all that the
// bindings, the tests' lists of ops and the registration of fakes (taps_ext/ops.py) know an op by. Schemas have no
// defaults: those are in taps_ext/ops.py alone.
template <typename Visit>
void for_each_op(Visit visit) {
  visit(
      "expand_frontier(Tensor logits, Tensor scores, int branching, Tensor? seeds, Tensor? positions, "
      "Tensor? temperature, Tensor? alpha, Tensor? beta) -> "
      "(Tensor tokens, Tensor scores, Tensor frontier, Tensor entropies)",
      &taps::expand_frontier);
  visit(
      "prune_tree(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, "
      "Tensor? proposers, int max_nodes) -> "
      "(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, Tensor proposers)",
      &taps::prune_tree);
  visit(
      "merge_trees(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, int? max_nodes) -> "
      "(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor proposers, Tensor node_map)",
      &taps::merge_trees);
  visit(
      "extend_tree(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, "
      "Tensor? proposers, Tensor text, Tensor lengths, float[] log_probs, int max_extension, int window, "
      "int proposer) -> "
      "(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, Tensor proposers)",
      &taps::extend_tree);
  visit("tree_depths(Tensor parents, Tensor num_nodes) -> Tensor", &taps::tree_depths);
  visit("ancestor_bits(Tensor parents, Tensor num_nodes) -> Tensor", &taps::ancestor_bits);
  visit(
      "tree_attention_mask(Tensor parents, Tensor num_nodes, Tensor prefix_lengths, int kv_length, "
      "ScalarType dtype) -> Tensor",
      &taps::tree_attention_mask);
  visit(
      "verify_tree(Tensor logits, Tensor tokens, Tensor parents, Tensor num_nodes, Tensor temperature, "
      "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions) -> "
      "(Tensor path, Tensor num_accepted, Tensor bonus_tokens, Tensor status)",
      &taps::verify_tree);
  visit("compact_kv(Tensor(a!) kv, Tensor path, Tensor num_accepted, Tensor prefix_lengths, int kv_length) -> ()",
        &taps::compact_kv);
}

// Defines a pybind11 function with the name and the argument names of its schema.
template <typename Result, typename... Arguments>
void bind(py::module_& module, const c10::FunctionSchema& schema, Result (*op)(Arguments...)) {
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    module.def(schema.name().c_str(), op, py::call_guard<py::gil_scoped_release>(),
               py::arg(schema.arguments().at(kIndex).name().c_str())...);
  }(std::index_sequence_for<Arguments...>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used()) {
  py::register_local_exception_translator(&translate_exception);

  m.def("build_info", &build_info, "What this module was built with.");
  py::dict schemas;
  for_each_op([&](const char* text, auto* op) {
    const c10::FunctionSchema schema = torch::jit::parseSchema(text);
    bind(m, schema, op);
    schemas[schema.name().c_str()] = text;
  });
  m.attr("schemas") = schemas;  // of every op, by its name
#if defined(TAPS_SIMT)
  simt::bind_controls(m);
#endif
}

#if !defined(TAPS_SIMT)

// One function per op for every backend: it looks at its tensors.
TORCH_LIBRARY(taps_ext, m) {
  for_each_op([&](const char* text, auto* op) {
    const std::string name = torch::jit::parseSchema(text).name();
    m.def(text);
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, op));
#if defined(TAPS_WITH_CUDA)
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CUDA, op));
#endif
  });
}

#endif  // TAPS_SIMT
