"""Declares torchvision's operators where its compiled half does not load beside a CPU build of torch.

`import torchvision` registers meta kernels for operators that its extension should have defined; transformers' image
processors import it. Nothing here is ever called: no model under test sees an image. It is a sitecustomize, because
vLLM inspects model classes in a process of its own.
"""

import contextlib

import torch

BACKWARD = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
OPERATORS = (
    *("nms", "qnms", "_interpolate_bilinear2d_aa", "_interpolate_bicubic2d_aa"),
    *BACKWARD,
    *(f"_{name}_backward" for name in BACKWARD),
)

library = torch.library.Library("torchvision", "DEF")
for operator in OPERATORS:
    with contextlib.suppress(RuntimeError):  # already defined: torchvision's own extension has loaded
        library.define(f"{operator}(Tensor x) -> Tensor")
