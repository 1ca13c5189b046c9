"""Repair quantized model checkpoints offline: explicit scales for every partition of a fused layer.

>>> import rewrite
>>> manifest = rewrite.convert("Qwen3.5-9B-FP8", "Qwen3.5-9B-FP8-fixed")  # doctest: +SKIP
"""

from __future__ import annotations

from rewrite.api import (
    DEFAULT_WORKERS,
    convert,
    inspect_checkpoint,
    make_plan,
    open_checkpoint,
    plan_conversion,
    publish_plan,
    verify,
)
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.checkpoint.storage import Storage
from rewrite.conversion import Conversion
from rewrite.errors import (
    CheckpointError,
    ConfigError,
    HeaderError,
    Refused,
    RewriteError,
    StorageError,
    Unsupported,
    UsageError,
)
from rewrite.inspection.inspection import Inspection
from rewrite.integrations.addresses import Address, open_storage
from rewrite.loaders.kernels import DEFAULT_PLATFORM, PLATFORMS
from rewrite.loaders.versions import LOADERS, Loader, find_loaders
from rewrite.planning.manifest import ByteCounts, Manifest
from rewrite.planning.plan import Plan
from rewrite.planning.profiles import PROFILES
from rewrite.progress import Progress
from rewrite.quantization.groups import SELECTIONS, Selection
from rewrite.quantization.kv_cache import KV_SCALES, KvScales
from rewrite.verification.result import DEFAULT_TOKENS, Check, Verification
from rewrite.verification.sample import DEFAULT_ROWS
from rewrite.version import __version__

__all__ = [
    "DEFAULT_PLATFORM",
    "DEFAULT_ROWS",
    "DEFAULT_TOKENS",
    "DEFAULT_WORKERS",
    "KV_SCALES",
    "LOADERS",
    "PLATFORMS",
    "PROFILES",
    "SELECTIONS",
    "Address",
    "ByteCounts",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "HeaderError",
    "Inspection",
    "KvScales",
    "Loader",
    "Manifest",
    "Plan",
    "Progress",
    "Refused",
    "RewriteError",
    "Selection",
    "Storage",
    "StorageError",
    "Unsupported",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "find_loaders",
    "inspect_checkpoint",
    "make_plan",
    "open_checkpoint",
    "open_storage",
    "plan_conversion",
    "publish_plan",
    "verify",
]
