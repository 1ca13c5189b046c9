"""What a converted checkpoint should look like: one file a profile, with all its facts.

A new profile is a file here and its object in :data:`PROFILES`.
"""

from __future__ import annotations

from rewrite.planning.profiles.base import Profile
from rewrite.planning.profiles.bf16 import BF16
from rewrite.planning.profiles.dequantized import DEQUANTIZED
from rewrite.planning.profiles.exact import DYNAMIC, EXACT
from rewrite.planning.profiles.partition import PARTITION
from rewrite.planning.profiles.portable import PORTABLE
from rewrite.planning.profiles.rescaled import RESCALED

#: By name, the default first.
PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (EXACT, DYNAMIC, PORTABLE, BF16, DEQUANTIZED, PARTITION, RESCALED)
}
