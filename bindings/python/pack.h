// pack: a layer from tensors in memory, and its weights replaced in place.
#pragma once

#include <nanobind/nanobind.h>

#include "flow.h"

namespace fourmoe::python {

class Keywords;
class PyLayer;

// fourmoe.pack and fourmoe.load of their keyword arguments; documented in python/fourmoe/_api.py.
PyLayer* pack(const nanobind::dict& given);
PyLayer* load(const nanobind::dict& given);

// Layer.refit: the weight arguments of pack.
void refit(PyLayer& layer, const nanobind::dict& given);

// The routing arguments of pack and route.
Routing read_routing(const Keywords& given);

}  // namespace fourmoe::python
