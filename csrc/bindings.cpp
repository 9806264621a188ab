// The one file that knows pybind11: every op of ops.h, once for eager calls (pybind11: the shortest way in) and once
// for the dispatcher (torch.compile, opcheck); and the index of look-up drafters, which is no op: it has a state. The
// module of the host stand-in (TAPS_SIMT) has the eager calls only, and the stand-in's controls.
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/extension.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lookup/lookup_index.h"
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
      "Tensor? temperature, Tensor? alpha, Tensor? beta, Tensor? token_ids) -> "
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

// Raises ValueError unless `tokens` is a row of token ids on the host.
void check_row(const at::Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.is_cpu() && tokens.scalar_type() == at::kLong && tokens.dim() == 1,
                    "tokens must be int64 [T] on the CPU, got ", tokens.scalar_type(), " ", tokens.sizes());
  TORCH_CHECK_VALUE(
      tokens.numel() == 0 || (tokens.min().item<int64_t>() >= 0 && tokens.max().item<int64_t>() <= INT32_MAX),
      "tokens must lie in 0..", INT32_MAX);
}

at::Tensor append(taps::LookupIndex& index, const at::Tensor& tokens, bool is_prompt) {
  check_row(tokens);
  const at::Tensor row = tokens.contiguous();
  at::Tensor log_probs = at::empty({row.numel()}, row.options().dtype(at::kFloat));
  index.append(row.const_data_ptr<int64_t>(), row.numel(), is_prompt, log_probs.mutable_data_ptr<float>());
  return log_probs;
}

void take_runs(taps::LookupIndex& index, int64_t length, const std::vector<std::vector<int32_t>>& runs) {
  TORCH_CHECK_VALUE(length >= (runs.empty() ? 0 : 1) && length <= INT32_MAX,
                    "runs must follow a match of at least 1 token, got a length of ", length);
  for (const std::vector<int32_t>& run : runs) {
    TORCH_CHECK_VALUE(std::all_of(run.begin(), run.end(), [](int32_t token) { return token >= 0; }),
                      "runs must not hold negative tokens, got ", run);
  }
  index.take_runs(static_cast<int>(length), runs);
}

// Writes into rows that the caller made, so that a batch is one tensor of each kind.
int64_t propose(const taps::LookupIndex& index, int64_t depth, int64_t branching, double min_score,
                const std::optional<std::tuple<int64_t, float, float>>& noise, const at::Tensor& tokens,
                const at::Tensor& parents, const at::Tensor& scores, const at::Tensor& entropies) {
  for (const at::Tensor& row : {tokens, parents, scores, entropies}) {
    TORCH_CHECK_VALUE(row.is_cpu() && row.dim() == 1 && row.is_contiguous() && row.numel() == tokens.numel(),
                      "tokens, parents, scores and entropies must be contiguous [N] on the CPU, got ", row.sizes());
  }
  TORCH_CHECK_VALUE(depth >= 1 && branching >= 1 && tokens.numel() >= 1,
                    "depth, branching and the number of slots must be at least 1, got ", depth, ", ", branching,
                    " and ", tokens.numel());
  taps::LookupNoise settings{};
  if (noise) {
    settings = std::make_from_tuple<taps::LookupNoise>(*noise);
    TORCH_CHECK_VALUE(settings.scale > 0 && 0 <= settings.beta && settings.beta < 1,
                      "noise must be (seed, scale above 0, beta from 0 to below 1), got a scale of ", settings.scale,
                      " and a beta of ", settings.beta);
  }
  return index.propose({depth, branching, tokens.numel(), min_score}, noise ? &settings : nullptr,
                       {tokens.mutable_data_ptr<int64_t>(), parents.mutable_data_ptr<int64_t>(),
                        scores.mutable_data_ptr<float>(), entropies.mutable_data_ptr<float>()});
}

// The index of a row's text, which look-up drafters hold (taps_ext/drafters/lookup.py).
void bind_lookup_index(py::module_& module) {
  using Index = taps::LookupIndex;
  py::class_<Index>(module, "LookupIndex", py::module_local())
      .def(py::init([](int max_context) {
             TORCH_CHECK_VALUE(1 <= max_context && max_context <= taps::kMostContext, "max_context must lie in 1..",
                               taps::kMostContext, ", got ", max_context);
             return Index(max_context);
           }),
           py::arg("max_context"))
      .def_property_readonly("size", &Index::size)
      .def_property_readonly("num_bytes", &Index::num_bytes)
      .def("append", &append, py::call_guard<py::gil_scoped_release>(), py::arg("tokens"), py::arg("is_prompt"))
      .def("take_runs", &take_runs, py::call_guard<py::gil_scoped_release>(), py::arg("length"), py::arg("runs"))
      .def("propose", &propose, py::call_guard<py::gil_scoped_release>(), py::arg("depth"), py::arg("branching"),
           py::arg("min_score"), py::arg("noise"), py::arg("tokens"), py::arg("parents"), py::arg("scores"),
           py::arg("entropies"));
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
  bind_lookup_index(m);
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
