"""What importing an engine needs beside a CPU build of torch, and beside a newer one than it was made for.

`import torchvision` registers meta kernels for operators that its extension should have defined; transformers' image
processors import it. Nothing here is ever called: no model under test sees an image. It is a sitecustomize, because
vLLM inspects model classes in a process of its own. vLLM 0.17.1 chooses the kernels that it computes with by a function
that torch has under another name now; loading uses none of them.
"""

import contextlib

import torch

BACKWARD = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
OPERATORS = (
    *("nms", "qnms", "_interpolate_bilinear2d_aa", "_interpolate_bicubic2d_aa"),
    *BACKWARD,
    *(f"_{name}_backward" for name in BACKWARD),
)

for operator in OPERATORS:
    with contextlib.suppress(RuntimeError):  # already defined: torchvision's own extension has loaded
        torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")

if not hasattr(torch._C._cpu, "_is_avx512_supported"):
    torch._C._cpu._is_avx512_supported = lambda: False  # type: ignore[attr-defined]
