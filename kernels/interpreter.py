"""Makes Triton's interpreter agree with a GPU on bfloat16: imported once, before the first launch.

The interpreter keeps bfloat16 as 16-bit integers: its tl.dot multiplies those bits, its arithmetic
adds them, and its casts truncate, all silently (seen in Triton 3.4 to 3.9, which do not support the
type there). Here tl.dot widens its operands, casts round to nearest even, and any other arithmetic
on bfloat16 is an error: a kernel must widen to fp32 first, as it should on a GPU.
"""
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_convert_float = interpreter._convert_float
Builder = interpreter.InterpreterBuilder


def _convert(x, source, target, rounding):
    """Float casts as the interpreter makes them, on arrays of bits; those from and to bfloat16 are
    ours."""
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(x).view(np.uint32)
        to_nearest = bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)  # ties to even
        rounded = to_nearest >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(x.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        return (x.astype(np.uint32) << 16).view(np.float32)
    return _convert_float(x, source, target, rounding)


def _wide(operand):
    """An operand's data, in fp32 where it is bfloat16."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return _convert(operand.data, tl.bfloat16, tl.float32, None)


def _dot(self, a, b, c, input_precision, max_num_imprecise_acc):
    with np.errstate(all="ignore"):
        product = np.matmul(_wide(a), _wide(b), dtype=c.data.dtype)
        return interpreter.TensorHandle(product + c.data, c.dtype.scalar)


def _refusing_bfloat16(method):
    def checked(self, *operands):
        if any(getattr(x, "dtype", tl.void).scalar == tl.bfloat16 for x in operands):
            raise TypeError(
                "arithmetic on bfloat16 in Triton's interpreter: cast to tl.float32 first")
        with np.errstate(all="ignore"):  # exp2 of a masked score: a GPU says nothing either
            return method(self, *operands)
    return checked


interpreter._convert_float = _convert
Builder.create_dot = _dot
Builder.binary_op = _refusing_bfloat16(Builder.binary_op)
Builder.unary_op = _refusing_bfloat16(Builder.unary_op)
