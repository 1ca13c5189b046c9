"""The checkpoint as it would be after some changes: what the check and the predictions look at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from rewrite.checkpoint.header import TensorInfo
from rewrite.checkpoint.storage import FileId
from rewrite.planning.jobs import TextFile
from rewrite.planning.segments import Fill
from rewrite.planning.shards import Edits, NewTensor


@dataclass(frozen=True)
class Preview(Checkpoint):
    """A checkpoint whose changed scales can be read already. Changed weights cannot; nothing else has moved."""

    new: Mapping[str, NewTensor]  # scales that no file holds yet
    texts: Mapping[str, str]  # small files that no storage holds yet

    def read_json(self, name: str) -> JsonFile | None:
        if name in self.texts:
            return JsonFile(name, self.texts[name], json.loads(self.texts[name]))
        return super().read_json(name)

    def read_tensors(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, bytes]]:
        stored = []
        for info in infos:
            if info.name in self.new:
                yield info, b"".join(s.data * s.count for s in self.new[info.name].segments if isinstance(s, Fill))
            else:
                stored.append(info)
        yield from super().read_tensors(stored)


def preview(checkpoint: Checkpoint, edits: Edits, texts: Iterable[TextFile], left_out: Iterable[str]) -> Checkpoint:
    """``checkpoint`` with the tensors of ``edits`` and the files ``texts``, without the files ``left_out``."""
    tensors = dict(checkpoint.tensors)
    new: dict[str, NewTensor] = {}
    for name, edit in edits.items():
        old = tensors.pop(name)
        if edit is None:
            continue
        info = edit.info(old)
        tensors[info.name] = info
        if all(isinstance(segment, Fill) for segment in edit.segments):
            new[info.name] = edit
    changed = {text.name: text.text for text in texts}
    gone = set(left_out)
    files: dict[str, FileId] = {name: file_id for name, file_id in checkpoint.files.items() if name not in gone}
    config = checkpoint.config
    if CONFIG_NAME in changed:
        config = JsonFile(CONFIG_NAME, changed[CONFIG_NAME], json.loads(changed[CONFIG_NAME]))
    return Preview(
        checkpoint.storage,
        config,
        checkpoint.index,
        checkpoint.shards,
        tensors,
        files,
        checkpoint.passed_over,
        new,
        changed,
    )
