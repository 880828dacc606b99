"""The C ABI as the tests written in Python call it: numpy arrays in, numpy arrays out."""
import ctypes
import os
import pathlib

import numpy as np

SOURCE = pathlib.Path(os.environ.get("FOURMOE_SOURCE", pathlib.Path(__file__).parents[2]))
BUILD = pathlib.Path(os.environ.get("FOURMOE_BUILD", SOURCE / "build"))
F32, BF16, I32 = 0, 2, 3
W4A16, W4A4, W4A8_INT8 = 0, 1, 2


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("unused", ctypes.c_int32),
                ("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("stride", ctypes.c_int64)]


class Options(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("precision", ctypes.c_int32),
                ("max_tokens", ctypes.c_int32), ("threads", ctypes.c_int32), ("executor", ctypes.c_void_p),
                ("device", ctypes.c_char_p), ("batch_invariant", ctypes.c_int32), ("unused", ctypes.c_int32),
                ("tuning", ctypes.c_char_p)]


class Call(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("hidden_states", Tensor), ("hidden_scales", Tensor), ("router_logits", Tensor),
                ("topk_ids", Tensor), ("topk_weights", Tensor), ("output", Tensor),
                ("picked_ids", ctypes.c_void_p), ("picked_weights", ctypes.c_void_p), ("stream", ctypes.c_void_p)]


def view(array, dtype):
    return Tensor(array.ctypes.data, dtype, 0, array.shape[0], array.shape[1], array.shape[1])


def to_bf16(values):
    """f32 -> the bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Library:
    """The experts of one checkpoint on one backend, in one precision."""

    def __init__(self, folder, precision, backend=b"cpu", device=None):
        self.c = ctypes.CDLL(str(BUILD / "libfourmoe.so"))
        self.c.fourmoe_last_error.restype = ctypes.c_char_p
        checkpoint = ctypes.c_void_p()
        self.check(self.c.fourmoe_checkpoint_open(str(folder).encode(), ctypes.byref(checkpoint)))
        options = Options(ctypes.sizeof(Options), backend, precision, 0, 0, None, device)
        indices, count = (ctypes.c_int32 * 64)(), ctypes.c_int64()
        self.check(self.c.fourmoe_checkpoint_layers(checkpoint, indices, ctypes.c_int64(64), ctypes.byref(count)))
        self.layers = {index: ctypes.c_void_p() for index in indices[:count.value]}
        for index, layer in self.layers.items():
            self.check(self.c.fourmoe_layer_load(checkpoint, index, ctypes.byref(options), ctypes.byref(layer)))
        self.c.fourmoe_checkpoint_close(checkpoint)

    def check(self, status):
        if status != 0:
            raise RuntimeError(self.c.fourmoe_last_error().decode())

    def run(self, layer, hidden, dtype, ids=None, weights=None):
        """hidden [T, H] (f32, or bf16 bits) -> [T, H] of the same kind; without ids the layer's own router picks."""
        output = np.full_like(hidden, 0xFFFF if dtype == BF16 else np.nan)
        call = Call(struct_size=ctypes.sizeof(Call), hidden_states=view(hidden, dtype), output=view(output, dtype))
        if ids is not None:
            ids, weights = np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(weights, np.float32)
            call.topk_ids, call.topk_weights = view(ids, I32), view(weights, F32)
        self.check(self.c.fourmoe_layer_run(self.layers[layer], ctypes.byref(call), None, ctypes.c_int64(0)))
        return output

    def experts(self, layer, hidden, ids, weights):
        return self.run(layer, np.ascontiguousarray(hidden, np.float32), F32, ids, weights)
