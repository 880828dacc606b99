"""The extension module: one class, errors, and functions that fourmoe._api documents."""
import os
from typing import Any, Mapping, Optional, Sequence, Union

_Array = Any  # an array of numpy, torch, JAX or cupy
_Weight = Union[_Array, Sequence[_Array]]

version: str

class Error(Exception):
    """Every refusal of the library."""

    reason: str
    """The stable name of the reason: "argument_invalid", "dtype_unsupported", ... (src/status.h)."""

class ArgumentError(Error, ValueError):
    """An argument or a file is refused; the message names it and what would pass."""

class UnavailableError(Error, RuntimeError):
    """The machine or this build cannot do what was asked for."""

class Layer:
    """One Mixture-of-Experts layer, made by fourmoe.load or fourmoe.pack. May be called from many threads at once."""

    def __call__(
        self,
        hidden_states: _Array,
        topk_ids: Optional[_Array] = None,
        topk_weights: Optional[_Array] = None,
        router_logits: Optional[_Array] = None,
        *,
        hidden_scales: Optional[_Array] = None,
        out: Optional[_Array] = None,
        workspace: Optional[_Array] = None,
        stream: Any = None,
        precision: Optional[str] = None,
        plan: Optional[str] = None,
    ) -> Any:
        """Computes the layer: [T, hidden], of the type of hidden_states, or `out`.

        hidden_states: [T, hidden] float32, float16 or bfloat16; T may be 0.
        topk_ids, topk_weights: [T, top_k] int32 or int64 and float32, float16 or bfloat16, used as they are; id -1 is
            no pick. Or router_logits: [T, experts] float32, float16 or bfloat16. Or neither, where the layer has a
            router (has_router).
        hidden_scales: [T, hidden/16] float8_e4m3fn or uint8, of tokens that are NVFP4 already: hidden_states is then
            [T, hidden/2] uint8, the values are code * scale * input_scale. For "w4a4"; output bfloat16.
        out: [>= T, hidden] float32, float16 or bfloat16; overwritten, rows from T on untouched.
        workspace: uint8, workspace_bytes() of them; without it the layer uses memory of its own, and calls take turns.
            With `out` and `workspace` a call allocates nothing that grows with T.
        stream: on a GPU, an integer or a stream object; without it the framework's current stream.
        precision, plan: others than the layer's; the first such call packs the weights once more, so it is refused where
            they lay in a GPU's memory, which is not kept.

        All arrays are where the layer is, rows may be strided; on a GPU those of hidden_states and out begin at multiples
        of 16 bytes, those of uint8 codes at multiples of 4. What is written (`out`, workspace) shares no memory with
        anything else. The result requires no gradient, whatever the arguments do. Raises ArgumentError naming the
        argument, what was expected and what was found.
        """
    def explain(self, tokens: int = 1024) -> str:
        """What `fourmoe explain` prints of this layer: the plan for up to `tokens`, and who refuses and why."""
    def wait(self, stream: Any = None) -> None:
        """On a GPU: waits for the stream's work (without one, the current stream of the last call's framework) and raises
        what its kernels found wrong, as an id out of range.

        Calls on a GPU enqueue and do not wait; without this, the next call raises it. At once on the host.
        """
    def workspace_bytes(self, tokens: int = 0, *, precision: Optional[str] = None, plan: Optional[str] = None) -> int:
        """Bytes that a call's workspace must have, at any alignment; the same for every number of tokens."""
    def refit(
        self,
        *,
        gate: Optional[_Weight] = None,
        up: _Weight,
        down: _Weight,
        gate_scale: Optional[_Weight] = None,
        up_scale: Optional[_Weight] = None,
        down_scale: Optional[_Weight] = None,
        gate_global: Optional[_Weight] = None,
        up_global: Optional[_Weight] = None,
        down_global: Optional[_Weight] = None,
        gate_bias: Optional[_Weight] = None,
        up_bias: Optional[_Weight] = None,
        down_bias: Optional[_Weight] = None,
        input_scale: Optional[_Weight] = None,
        inter_scale: Optional[_Weight] = None,
        stream: Any = None,
    ) -> None:
        """Replaces the weights in place; see fourmoe.refit."""
    def _refit(self, given: Mapping[str, Any]) -> None: ...
    @property
    def hidden(self) -> int:
        """Columns of a token."""
    @property
    def inter(self) -> int:
        """Intermediate size of one expert."""
    @property
    def experts(self) -> int:
        """Experts of the whole layer."""
    @property
    def top_k(self) -> int:
        """Picks of a token."""
    @property
    def first_expert(self) -> int:
        """First expert held here."""
    @property
    def local_experts(self) -> int:
        """Experts held here."""
    @property
    def max_tokens(self) -> int:
        """Most tokens of one pass."""
    @property
    def precision(self) -> str:
        """ "w4a16", "w4a4" or "w4a8_int8"."""
    @property
    def encoding(self) -> str:
        """Of the weights: "nvfp4", "mxfp4", "bf16", "f16", "f32" or "fp8"."""
    @property
    def activation(self) -> str:
        """ "swiglu", ...: see fourmoe.pack."""
    @property
    def plan(self) -> str:
        """The backend that computes: "cpu", "reference", ..."""
    @property
    def device(self) -> str:
        """ "cpu" or "cuda:N"."""
    @property
    def has_router(self) -> bool:
        """Calls without picks and logits are accepted."""
    @property
    def has_shared(self) -> bool:
        """Shared experts are computed and added."""
    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights; 0 where the backend reads the arrays or files themselves."""
    @property
    def notes(self) -> list[str]:
        """Oddities of the checkpoint, and of the file of measured choices, in words."""
    @property
    def handle(self) -> int:
        """A number that names the layer while it lives; see find_layer."""

def find_layer(handle: int) -> Layer: ...
def load(given: Mapping[str, Any]) -> Layer: ...
def layers(path: Union[str, os.PathLike[str]]) -> list[int]: ...
def pack(given: Mapping[str, Any]) -> Layer: ...
def quantize(values: _Array, global_scale: Any = None) -> tuple[Any, Any, Any]: ...
def decode(codes: _Array, scales: _Array, global_scale: Any = None) -> Any: ...
def route(given: Mapping[str, Any]) -> tuple[Any, Any]: ...
def split_gate_up(tensor: _Array, group: int, up_first: bool) -> tuple[Any, Any]: ...
def linear_scales(scales: _Array) -> Any: ...
