// The one file that knows pybind11: every op of ops.h, once for eager calls (pybind11: the shortest way in) and once
// for the dispatcher (torch.compile, opcheck); their fake implementations are in taps_ext/fakes.py. The module of the
// host stand-in (TAPS_SIMT) has the eager calls only, and the stand-in's controls.
#include <torch/extension.h>

#include <map>
#include <string>

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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used()) {
  using py::arg;
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::register_local_exception_translator(&translate_exception);

  m.def("build_info", &build_info, "What this module was built with.");
  m.def("expand_frontier", &taps::expand_frontier, no_gil(), arg("logits"), arg("scores"), arg("branching"),
        arg("seeds") = py::none(), arg("positions") = py::none(), arg("temperature") = py::none(),
        arg("alpha") = py::none(), arg("beta") = py::none());
  m.def("prune_tree", &taps::prune_tree, no_gil(), arg("tokens"), arg("parents"), arg("scores"), arg("num_nodes"),
        arg("entropies"), arg("proposers"), arg("max_nodes"));
  m.def("merge_trees", &taps::merge_trees, no_gil(), arg("tokens"), arg("parents"), arg("scores"), arg("num_nodes"),
        arg("max_nodes") = py::none());
  m.def("tree_depths", &taps::tree_depths, no_gil(), arg("parents"), arg("num_nodes"));
  m.def("tree_paths", &taps::tree_paths, no_gil(), arg("parents"), arg("num_nodes"), arg("nodes"), arg("max_depth"));
  m.def("ancestor_bits", &taps::ancestor_bits, no_gil(), arg("parents"), arg("num_nodes"));
  m.def("tree_attention_mask", &taps::tree_attention_mask, no_gil(), arg("parents"), arg("num_nodes"),
        arg("prefix_lengths"), arg("kv_length"), arg("dtype"));
  m.def("verify_tree", &taps::verify_tree, no_gil(), arg("logits"), arg("tokens"), arg("parents"), arg("num_nodes"),
        arg("temperature"), arg("top_k"), arg("top_p"), arg("min_p"), arg("seeds"), arg("positions"));
  m.def("compact_kv", &taps::compact_kv, no_gil(), arg("kv"), arg("path"), arg("num_accepted"), arg("prefix_lengths"),
        arg("kv_length"));
#if defined(TAPS_SIMT)
  simt::bind_controls(m);
#endif
}

#if !defined(TAPS_SIMT)

TORCH_LIBRARY(taps_ext, m) {
  m.def(
      "expand_frontier(Tensor logits, Tensor scores, int branching, Tensor? seeds=None, Tensor? positions=None, "
      "Tensor? temperature=None, Tensor? alpha=None, Tensor? beta=None) -> "
      "(Tensor tokens, Tensor scores, Tensor frontier, Tensor entropies)");
  m.def(
      "prune_tree(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, "
      "Tensor? proposers, int max_nodes) -> "
      "(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor entropies, Tensor proposers)");
  m.def(
      "merge_trees(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, int? max_nodes) -> "
      "(Tensor tokens, Tensor parents, Tensor scores, Tensor num_nodes, Tensor proposers, Tensor node_map)");
  m.def("tree_depths(Tensor parents, Tensor num_nodes) -> Tensor");
  m.def("tree_paths(Tensor parents, Tensor num_nodes, Tensor? nodes, int max_depth) -> Tensor");
  m.def("ancestor_bits(Tensor parents, Tensor num_nodes) -> Tensor");
  m.def(
      "tree_attention_mask(Tensor parents, Tensor num_nodes, Tensor prefix_lengths, int kv_length, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "verify_tree(Tensor logits, Tensor tokens, Tensor parents, Tensor num_nodes, Tensor temperature, "
      "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions) -> "
      "(Tensor path, Tensor num_accepted, Tensor bonus_tokens, Tensor status)");
  m.def("compact_kv(Tensor(a!) kv, Tensor path, Tensor num_accepted, Tensor prefix_lengths, int kv_length) -> ()");
}

namespace {

// One function per op for every backend: it looks at its tensors.
void implement(torch::Library& m) {
  m.impl("expand_frontier", &taps::expand_frontier);
  m.impl("prune_tree", &taps::prune_tree);
  m.impl("merge_trees", &taps::merge_trees);
  m.impl("tree_depths", &taps::tree_depths);
  m.impl("tree_paths", &taps::tree_paths);
  m.impl("ancestor_bits", &taps::ancestor_bits);
  m.impl("tree_attention_mask", &taps::tree_attention_mask);
  m.impl("verify_tree", &taps::verify_tree);
  m.impl("compact_kv", &taps::compact_kv);
}

}  // namespace

TORCH_LIBRARY_IMPL(taps_ext, CPU, m) {
  implement(m);
}

#if defined(TAPS_WITH_CUDA)
TORCH_LIBRARY_IMPL(taps_ext, CUDA, m) {
  implement(m);
}
#endif

#endif  // TAPS_SIMT
