"""What each engine version makes of a checkpoint: predictions, proven by recorded runs of the real engines.

``views`` is the checkpoint as a loader sees it, ``behaviors`` and ``obstacles`` are what loaders do, ``versions`` says
which version does what.
"""
