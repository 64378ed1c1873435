"""Every kernel in every configuration that production launches, one file a family of ops."""

from collections.abc import Iterator

from minicpm_kernels_testing.cases import attention, linear_cross_entropy, moe, rms_norm, rope, swiglu
from minicpm_kernels_testing.sm90_compile import Sm90Case


def all_cases() -> Iterator[Sm90Case]:
    """The cases of every family, in alphabetical order of the families. Imports Triton."""
    for family in (attention, linear_cross_entropy, moe, rms_norm, rope, swiglu):
        yield from family.cases()
