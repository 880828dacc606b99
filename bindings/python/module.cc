// fourmoe._core: the Python extension over layer.h: translates arguments, releases the interpreter lock, nothing else.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/python/functions.h"
#include "bindings/python/pack.h"
#include "bindings/python/py_layer.h"
#include "status.h"

namespace fourmoe::python {
namespace {

PyObject* argument_error = nullptr;     // fourmoe.ArgumentError; the module's
PyObject* unavailable_error = nullptr;  // fourmoe.UnavailableError

// What the caller can change about the arguments or the files, against what the machine or the build lacks.
PyObject* error_of(Reason reason) {
  const int code = static_cast<int>(reason);
  const bool caller = code < 40 || (code >= 60 && reason != Reason::no_plan && code < 90);
  return caller ? argument_error : unavailable_error;
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    // Names of files and tensors may be any bytes.
    const std::string_view words = error.what();
    const nb::object text =
        nb::steal(PyUnicode_DecodeUTF8(words.data(), static_cast<Py_ssize_t>(words.size()), "replace"));
    const nb::object made = nb::borrow(error_of(error.reason()))(text);
    made.attr("reason") = std::string(reason_name(error.reason()));
    PyErr_SetObject(error_of(error.reason()), made.ptr());
  }
}

PyObject* add_error(nb::module_& m, const char* name, nb::handle bases, const char* doc) {
  PyObject* type = PyErr_NewExceptionWithDoc(fmt::format("fourmoe.{}", name).c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) nb::raise_python_error();
  m.attr(name) = nb::borrow(type);
  return type;
}

void add_errors(nb::module_& m) {
  nb::object base = nb::steal(
      add_error(m, "Error", nb::borrow(PyExc_Exception), "Every refusal of the library. `reason` is its stable name."));
  base.attr("reason") = "";
  argument_error = add_error(m, "ArgumentError", nb::make_tuple(base, nb::borrow(PyExc_ValueError)),
                             "An argument or a file is refused; the message names it and what would pass.");
  unavailable_error = add_error(m, "UnavailableError", nb::make_tuple(base, nb::borrow(PyExc_RuntimeError)),
                                "The machine or this build cannot do what was asked for.");
  nb::register_exception_translator(translate);
}

using Text = std::optional<std::string>;

// The stub _core.pyi has the whole text.
constexpr const char* kCallDoc =
    "Computes the layer: [T, hidden], of the type of hidden_states, or `out`.\n\n"
    "hidden_states: [T, hidden] float32, float16 or bfloat16. topk_ids [T, top_k] int32 or int64 (-1: no pick) with\n"
    "topk_weights [T, top_k], or router_logits [T, experts], or neither where has_router. out: overwritten, rows from "
    "T\n"
    "on untouched. workspace: uint8, workspace_bytes() of them. Raises ArgumentError naming the argument, what was\n"
    "expected and what was found.";

nb::object call_layer(PyLayer& layer, nb::handle hidden_states, nb::handle topk_ids, nb::handle topk_weights,
                      nb::handle router_logits, nb::handle hidden_scales, nb::handle out, nb::handle workspace,
                      nb::handle stream, Text precision, Text plan) {
  return layer.call({hidden_states, topk_ids, topk_weights, router_logits, hidden_scales, out, workspace, stream,
                     std::move(precision), std::move(plan)});
}

void add_layer(nb::module_& m) {
  const auto problem = [](const PyLayer& layer) -> const Problem& { return layer.problem(); };
  nb::class_<PyLayer>(m, "Layer", nb::is_weak_referenceable(),
                      "One Mixture-of-Experts layer, loaded or packed; see fourmoe.load and fourmoe.pack.")
      .def("__call__", call_layer, nb::arg("hidden_states").none(), nb::arg("topk_ids") = nb::none(),
           nb::arg("topk_weights") = nb::none(), nb::arg("router_logits") = nb::none(), nb::kw_only(),
           nb::arg("hidden_scales") = nb::none(), nb::arg("out") = nb::none(), nb::arg("workspace") = nb::none(),
           nb::arg("stream") = nb::none(), nb::arg("precision") = nb::none(), nb::arg("plan") = nb::none(), kCallDoc)
      .def("explain", &PyLayer::explain, nb::arg("tokens") = 1024,
           "What `fourmoe explain` prints of this layer: the plan for up to `tokens`, and who refuses and why.")
      .def("wait", &PyLayer::wait, nb::arg("stream") = nb::none(),
           "On a GPU: waits for the stream's work and raises what its kernels found wrong. At once on the host.")
      .def("workspace_bytes", &PyLayer::workspace_bytes, nb::arg("tokens") = 0, nb::kw_only(),
           nb::arg("precision") = nb::none(), nb::arg("plan") = nb::none(),
           "Bytes that a call's workspace must have, at any alignment; the same for every number of tokens.")
      .def("_refit", [](PyLayer& layer, const nb::dict& given) { refit(layer, given); })
      .def("__repr__", &PyLayer::repr)
      .def_prop_ro("hidden", [=](const PyLayer& l) { return problem(l).hidden; })
      .def_prop_ro("inter", [=](const PyLayer& l) { return problem(l).inter; })
      .def_prop_ro("experts", [=](const PyLayer& l) { return problem(l).experts; })
      .def_prop_ro("top_k", [=](const PyLayer& l) { return problem(l).top_k; })
      .def_prop_ro("first_expert", [=](const PyLayer& l) { return problem(l).first_expert; })
      .def_prop_ro("local_experts", [=](const PyLayer& l) { return problem(l).local_experts; })
      .def_prop_ro("max_tokens", [=](const PyLayer& l) { return problem(l).max_tokens; })
      .def_prop_ro("precision", [=](const PyLayer& l) { return std::string(precision_name(problem(l).precision)); })
      .def_prop_ro("encoding",
                   [=](const PyLayer& l) { return std::string(format::encoding_name(problem(l).encoding)); })
      .def_prop_ro("activation",
                   [=](const PyLayer& l) { return std::string(activation_name(problem(l).activation.kind)); })
      .def_prop_ro("plan", [](const PyLayer& l) { return l.layer().plan().backend; })
      .def_prop_ro("device", [](const PyLayer& l) { return device_words(l.choices().device); })
      .def_prop_ro("has_router", [](const PyLayer& l) { return !l.layer().weights().router.empty(); })
      .def_prop_ro("has_shared", [](const PyLayer& l) { return l.layer().weights().shared.has_value(); })
      .def_prop_ro("packed_bytes", [](const PyLayer& l) { return l.layer().packed_bytes(); })
      .def_prop_ro("notes", [](const PyLayer& l) { return l.layer().notes(); })
      .def_prop_ro("handle", &PyLayer::handle);
}

nb::object find_layer(i64 handle) {
  PyLayer* layer = PyLayer::find(handle);
  const nb::object object = layer != nullptr ? nb::find(*layer) : nb::object();
  if (object.is_valid()) return object;
  throw Error(Reason::argument_invalid, fmt::format("no layer has the handle {}: it was freed", handle));
}

}  // namespace
}  // namespace fourmoe::python

NB_MODULE(_core, m) {
  using namespace fourmoe::python;
  nb::set_leak_warnings(false);  // interpreters may end before module-level layers do
  m.attr("version") = FOURMOE_VERSION;
  add_errors(m);
  add_layer(m);
  m.def("find_layer", find_layer, nb::arg("handle"));
  m.def("load", load, nb::arg("given"));
  m.def("layers", layers, nb::arg("path"));
  m.def("pack", pack, nb::arg("given"));
  m.def("quantize", quantize, nb::arg("values"), nb::arg("global_scale") = nb::none());
  m.def("decode", decode, nb::arg("codes"), nb::arg("scales"), nb::arg("global_scale") = nb::none());
  m.def("route", route_logits, nb::arg("given"));
  m.def("split_gate_up", split_gate_up, nb::arg("tensor"), nb::arg("group"), nb::arg("up_first"));
  m.def("linear_scales", linear_scales, nb::arg("scales"));
}
