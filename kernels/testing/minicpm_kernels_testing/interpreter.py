"""Patches for Triton's CPU interpreter, in which kernels are tested on a machine without a GPU.

The interpreter (``TRITON_INTERPRET=1``) keeps a bf16 tensor as its raw 16 bits in a numpy ``uint16`` array,
and then computes on these integers as if they were the values: bf16 results are silently wrong, and fp32 is
rounded to bf16 half up, with a carry that can corrupt the exponent. ``patch_interpreter()`` makes bf16 compute as the
hardware does: widen to float32, compute, round to nearest even. It also removes a numpy deprecation warning
and a large cost of every call of a device function. Seen in Triton 3.6.0.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_BF16_NAN = np.uint16(0x7FC0)


def patch_interpreter() -> None:
    """Patch the interpreter in this process; a second call does nothing. Needs ``TRITON_INTERPRET=1``."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.zeros, interpreter.InterpretedFunction):
        raise RuntimeError(
            "Triton was imported without its interpreter; set TRITON_INTERPRET=1 before the first import"
        )
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "get_bf16"):  # added below: present means already patched
        return
    # A function looked up on tl.core stays unpatched until the first device function runs; patch it for
    # good here, so that the calls below need not patch anything again.
    interpreter._patch_lang(tl.zeros.fn)
    _patch_bf16_arithmetic(interpreter, tl)
    _patch_bf16_casts(interpreter, tl)
    _add_descriptor_reduce(interpreter)
    _patch_scalar_index(interpreter)
    _patch_device_calls(interpreter, triton)


def bf16_bits_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bf16, given as raw bits, to float32; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round to bf16, nearest even, and return the raw bits; every NaN becomes the quiet NaN."""
    narrow = np.ascontiguousarray(values, dtype=np.float32)
    bits = narrow.view(np.uint32)
    # Adding just under half a unit, plus one where the kept part is odd, carries exactly when it must round
    # up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(narrow), _BF16_NAN, rounded.astype(np.uint16))


def _patch_bf16_arithmetic(interpreter: Any, tl: Any) -> None:
    """Compute elementwise operations and dot products of bf16 operands in float32."""

    def is_bf16(value: Any) -> bool:
        return (
            isinstance(value, interpreter.TensorHandle)
            and value.get_element_ty() == tl.bfloat16
            and value.data.dtype == np.uint16  # a comparison's result carries the operands' type on booleans
        )

    def widen(value: Any) -> Any:
        if not is_bf16(value):
            return value
        return interpreter.TensorHandle(bf16_bits_to_float32(value.data), tl.float32)

    def in_float32(method: Callable[..., Any], *, narrow_result: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def patched(self: Any, *operands: Any) -> Any:
            if not any(is_bf16(operand) for operand in operands):
                return method(self, *operands)
            result = method(self, *(widen(operand) for operand in operands))
            if not narrow_result or result.data.dtype == np.bool_:
                return result
            return interpreter.TensorHandle(float32_to_bf16_bits(result.data), tl.bfloat16)

        return patched

    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name), narrow_result=True))
    builder.create_dot = in_float32(builder.create_dot, narrow_result=False)


def _patch_bf16_casts(interpreter: Any, tl: Any) -> None:
    """Convert between bf16 and other types by value, and make bf16 constants possible."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    def by_value(convert: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(convert)
        def patched(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            from_bf16, to_bf16 = source.dtype.scalar == tl.bfloat16, target.scalar == tl.bfloat16
            if from_bf16 == to_bf16:
                return convert(self, source, target, *rest)
            if to_bf16:
                return handle(float32_to_bf16_bits(source.data), tl.bfloat16)
            values = bf16_bits_to_float32(source.data)
            return handle(values.astype(interpreter._get_np_dtype(target.scalar)), target.scalar)

        return patched

    def get_bf16(self: Any, value: float) -> Any:
        return handle(float32_to_bf16_bits(np.array([value])), tl.bfloat16)

    builder.cast_impl = by_value(builder.cast_impl)
    builder.create_fp_to_fp = by_value(builder.create_fp_to_fp)
    builder.get_bf16 = get_bf16


def _add_descriptor_reduce(interpreter: Any) -> None:
    """Give the interpreter the TMA reduction, ``desc.atomic_add``, which it lacks; only for additions."""
    from triton._C.libtriton import ir

    def create_descriptor_reduce(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> None:
        if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
            raise NotImplementedError(
                f"the interpreter reduces through a descriptor by addition only, not {kind}"
            )
        # Programs run one after another here, so loading and storing needs no atomic operation.
        pointers, mask = descriptor.materialize_pointers(indices)
        mask = interpreter.TensorHandle(mask, value.dtype)
        held = self.create_masked_load(pointers, mask, None, None, None, False)
        self.create_masked_store(pointers, self.create_fadd(held, value), mask, None, None)

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def _patch_scalar_index(interpreter: Any) -> None:
    """Turn a one-element tensor into an index without numpy's deprecated conversion of arrays to scalars."""
    patch = interpreter._patch_lang_tensor

    @functools.wraps(patch)
    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _patch_device_calls(interpreter: Any, triton: Any) -> None:
    """Call device functions (``tl.zeros`` is one) without patching the whole language module each time."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
