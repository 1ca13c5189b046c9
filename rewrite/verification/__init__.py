"""The proof: a converted checkpoint is what the fixed loader computes, and nothing else in it changed.

Shares no layout code with ``convert``, so that one cannot hide the other's mistake. ``run`` asks five questions, one
module each: structure, untouched, weights, outputs; the fifth is ``rewrite.inspection`` of OUT. torch and
compressed-tensors are needed here and only here; nothing else of the library imports more than ``result``.
"""
