"""Model and profile → :class:`~rewrite.planning.plan.Plan`: everything that will be written, as data.

``planner`` asks a profile for its changes, ``check`` interprets the result again and refuses what was not meant, then
the shards are laid out. Nothing here writes, or knows where the bytes lie.
"""
