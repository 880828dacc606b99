// Functions for inspection: number formats, routing, layouts. Documented in python/fourmoe/_api.py.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <tuple>
#include <vector>

#include "format/number.h"

namespace fourmoe::python {

std::vector<i32> layers(const nanobind::object& path);

// values [..., R, C] f32|f16|bf16 -> codes [..., R, C/2] u8, scales [..., R, C/16] u8 (E4M3), globals [...] f32
std::tuple<nanobind::object, nanobind::object, nanobind::object> quantize(nanobind::handle values,
                                                                          nanobind::handle global_scale);

// codes [..., R, C/2] u8, scales [..., R, C/16 or C/32], globals [...] or none -> values [..., R, C] f32
nanobind::object decode(nanobind::handle codes, nanobind::handle scales, nanobind::handle global_scale);

// logits [T, E] -> ids [T, k] i32, weights [T, k] f32
std::tuple<nanobind::object, nanobind::object> route_logits(const nanobind::dict& given);

// [E, 2R, C] u8 or floats, gate and up alternating in blocks of rows -> gate [E, R, C], up [E, R, C]; block 0: halves
std::tuple<nanobind::object, nanobind::object> split_gate_up(nanobind::handle tensor, i64 block, bool up_first);

// [32, 4, R/128, 4, C/4, E] bytes in any strides -> [E, R, C]
nanobind::object linear_scales(nanobind::handle scales);

}  // namespace fourmoe::python
