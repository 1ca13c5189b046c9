"""`python -m benchmark.imports`: what `rewrite verify` imports, and nothing else."""

from __future__ import annotations

import compressed_tensors.quantization  # noqa: F401
import torch  # noqa: F401

import rewrite.cli.commands
import rewrite.verification.outputs  # noqa: F401
