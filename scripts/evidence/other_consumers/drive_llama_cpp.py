"""Runs llama.cpp's own converter, convert_hf_to_gguf.py, on a checkpoint and reads the file with its own `gguf`.

Replaced: the step that stores the vocabulary, as the fixtures' tokenizers are too small to be one that llama.cpp knows.
`--no-mtp` is given to models that might have layers for several tokens, as the fixtures have none. F32 is asked for, so
that nothing is rounded but by the reading. SOURCE is the folder of the package that has its source.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from other_consumers.driver import Arrays, run

SOURCE = Path(os.environ["SOURCE"]) / "vendor" / "llama.cpp"
_WITH_MTP = ("Qwen3_5", "Qwen3Next")


def _converter() -> Any:
    """The module; every model class then stores no vocabulary."""
    sys.path.insert(0, str(SOURCE))
    converter, conversion = importlib.import_module("convert_hf_to_gguf"), importlib.import_module("conversion")
    conversion.load_all_models()
    base = importlib.import_module("conversion.base").TextModel
    _without_vocabulary(base, base)
    return converter


def _without_vocabulary(model: Any, base: Any) -> None:
    model.set_vocab = base._set_vocab_none
    for each in model.__subclasses__():
        _without_vocabulary(each, base)


def main() -> None:
    """Convert and read back all checkpoints."""
    converter = _converter()
    gguf = importlib.import_module("gguf")
    if not Path(str(gguf.__file__)).is_relative_to(SOURCE):
        raise RuntimeError(f"not llama.cpp's own gguf: {gguf.__file__}")

    def read(checkpoint: Path) -> Arrays:
        architecture = json.loads((checkpoint / "config.json").read_text())["architectures"][0]
        extra = ["--no-mtp"] if architecture.startswith(_WITH_MTP) else []
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            words = ["convert_hf_to_gguf.py", str(checkpoint), "--outtype", "f32", "--outfile", str(file), *extra]
            before, sys.argv = sys.argv, words
            try:
                converter.main()
            finally:
                sys.argv = before
            return {each.name: _values(gguf, each) for each in gguf.GGUFReader(str(file)).tensors}

    # its parts are modules of their own: where an error was raised is said relative to them
    run(read, ("conversion", "gguf", "transformers"))


def _values(gguf: Any, tensor: Any) -> Any:
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


if __name__ == "__main__":
    main()
