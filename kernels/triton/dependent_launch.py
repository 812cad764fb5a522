"""Programmatic dependent launch: a kernel's programs are on the device before the kernel in front has ended, and wait for it there.

A launch costs a microsecond or two, and a step of few tokens is some hundred short kernels one after another. Whatever a kernel does
before `after_the_kernel_before` may touch only what no earlier kernel of the step writes (weights); from sm_90 on (CUDA C++ Programming
Guide, "Programmatic Dependent Launch and Synchronization").
"""

import triton
import triton.language as tl


@triton.jit
def after_the_kernel_before(DEPENDENT: tl.constexpr):
    """Waits until everything that was launched before has ended and is visible, and lets the next kernel's programs come in."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        # Not before the wait: that this kernel's programs run tells the next ones that all before this kernel is done.
        tl.extra.cuda.gdc_launch_dependents()
