"""The checkpoint as it would be after some changes: what the check and the predictions look at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from rewrite.checkpoint.forms import Form, find_forms
from rewrite.checkpoint.header import TensorInfo
from rewrite.checkpoint.storage import FileId
from rewrite.planning.jobs import TextFile
from rewrite.planning.segments import Fill
from rewrite.planning.shards import Edits, NewTensor


@dataclass(frozen=True)
class Preview(Checkpoint):
    """A checkpoint whose changed scales can be read already. Changed weights cannot; nothing else has moved."""

    before: Checkpoint
    edited: tuple[str, ...]  # the names of changed, new and dropped tensors
    new: Mapping[str, NewTensor]  # scales that no file holds yet
    texts: Mapping[str, str]  # small files that no storage holds yet

    @cached_property
    def forms(self) -> Mapping[str, Form]:
        """Those of the modules that change are found anew."""
        old = self.before.forms
        modules = {name.rpartition(".")[0] for name in self.edited}
        stored = (f"{module}.{kind}" for module in modules if module in old for kind in old[module].tensors)
        names = dict.fromkeys([*stored, *self.edited])
        new = find_forms(self.tensors[name] for name in names if name in self.tensors)
        forms = dict(old)  # a copy is small; one that is filtered is twice as large for a while
        for module in modules:
            forms.pop(module, None)
        forms.update(new)
        return forms

    def read_json(self, name: str) -> JsonFile | None:
        if name in self.texts:
            return JsonFile(name, self.texts[name], json.loads(self.texts[name]))
        return super().read_json(name)

    def read_runs(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[list[TensorInfo], bytes]]:
        stored = []
        for info in infos:
            if info.name in self.new:
                yield [info], b"".join(s.data * s.count for s in self.new[info.name].segments if isinstance(s, Fill))
            else:
                stored.append(info)
        yield from super().read_runs(stored)


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
        checkpoint,
        (*edits, *(edit.name for edit in edits.values() if edit is not None and edit.name is not None)),
        new,
        changed,
    )
