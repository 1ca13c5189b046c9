"""`rewrite try`: an engine loads a checkpoint, and what it holds is compared with what the files mean.

`driver.py` measures, in the engine's own Python; `engine.py` runs it there; `selection.py` says which layers are
enough; `verdict.py` says what the measurements mean. No model family is known anywhere in here.
"""
