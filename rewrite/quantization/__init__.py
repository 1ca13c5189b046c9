"""What a checkpoint means: architecture, dialect, fused groups and the scheme of every module.

:func:`rewrite.quantization.model.interpret` reads it once into a :class:`~rewrite.quantization.model.Model`.
"""
