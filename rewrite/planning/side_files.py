"""The small files of an output: config, index and a second config, edited where they must change."""

from __future__ import annotations

from collections.abc import Iterator

from rewrite.checkpoint.bounded_json import JsonFile
from rewrite.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from rewrite.checkpoint.json_edit import append_value, remove_member, replace_value
from rewrite.errors import CheckpointError
from rewrite.planning.jobs import TextFile
from rewrite.planning.manifest import MANIFEST_NAME
from rewrite.planning.profiles.base import Changes
from rewrite.planning.shards import Edits
from rewrite.quantization.dialects import config_path, config_paths, hf_quant_config
from rewrite.quantization.model import Model

CONFIG_COPY_NAME = "quantization_config.json"


def new_texts(model: Model, changes: Changes) -> Iterator[TextFile]:
    """Config and ModelOpt's own file, where they change."""
    checkpoint = model.checkpoint
    if not changes.any:
        return
    old, new = model.dialect, changes.dialect
    if new is None or new.value == old.value:
        return
    if not new.value:
        yield from _changed(checkpoint.config, _without_quantization(checkpoint.config), checkpoint)
        return
    path = config_path(checkpoint.config.value)
    if path is not None:
        yield from _changed(checkpoint.config, replace_value(checkpoint.config.text, path, new.value), checkpoint)
    elif new.name != old.name:
        text = append_value(checkpoint.config.text, "quantization_config", new.value)
        yield from _changed(checkpoint.config, text, checkpoint)
    file = checkpoint.read_json(hf_quant_config.NAME)
    if file is not None and not contradicts(model, changes):
        yield from _changed(file, hf_quant_config.updated(file, old, new), checkpoint)


def _without_quantization(config: JsonFile) -> str:
    """The config without every part that some loader may take for the quantization."""
    text = config.text
    for path in config_paths(config.value):
        text = remove_member(text, path)
    return text


def new_index(checkpoint: Checkpoint, edits: Edits) -> Iterator[TextFile]:
    """The index, where it changes. Only the writer needs it: with 100,000 tensors it takes longer than all else."""
    if edits and checkpoint.index is not None:
        yield from _changed(checkpoint.index, _index_text(checkpoint, checkpoint.index, edits), checkpoint)


def stale_files(model: Model, changes: Changes) -> Iterator[str]:
    """Files that would contradict the output: an earlier manifest, and a second config of the old dialect."""
    if changes.any:
        _refuse_directory_of_our_name(model.checkpoint)
        if MANIFEST_NAME in model.checkpoint.files:
            yield MANIFEST_NAME
        if contradicts(model, changes):
            yield hf_quant_config.NAME
        if _copy_is_stale(model, changes):
            yield CONFIG_COPY_NAME


def _copy_is_stale(model: Model, changes: Changes) -> bool:
    """Whether a copy of the quantization config lies beside config.json (AutoRound writes one), which has changed."""
    changed = changes.dialect is not None and changes.dialect.value != model.dialect.value
    return changed and CONFIG_COPY_NAME in model.checkpoint.files


def contradicts(model: Model, changes: Changes) -> bool:
    """Whether ModelOpt's own file would be wrong beside the new config: one of another dialect, or changed while the
    file stated another dialect all along."""
    file = model.checkpoint.read_json(hf_quant_config.NAME)
    new, old = changes.dialect, model.dialect
    if file is None or new is None or new.value == old.value:
        return False
    if new.name != old.name:
        return True
    second = model.second_dialect or (old if config_path(model.checkpoint.config.value) is None else None)
    return hf_quant_config.states_something(file) and (second is None or second.name != old.name)


def notes(model: Model, changes: Changes) -> Iterator[str]:
    """What the user should know of the files of this checkpoint."""
    checkpoint = model.checkpoint
    for name in checkpoint.passed_over:
        yield f"{name} is left out: it belongs to a tool, not to the checkpoint"
    for name in checkpoint.files:
        if name.endswith(".safetensors") and name not in checkpoint.shards:
            yield f"{name} is not in the index, so no loader reads it: copied as it is"
    file = checkpoint.read_json(hf_quant_config.NAME)
    stated_twice = file is not None and config_path(checkpoint.config.value) is not None
    if file is not None and stated_twice and hf_quant_config.disagrees(file, model.dialect.value):
        yield f"{hf_quant_config.NAME} and {CONFIG_NAME} disagree: {CONFIG_NAME} counted, as in vLLM and SGLang"
    if changes.dialect is not None and not changes.dialect.value:
        if model.dialect.value:
            yield "the config states no quantization any more: all weights are plain"
    elif changes.dialect is not None and changes.dialect.name != model.dialect.name:
        yield (f"the config is stated as {changes.dialect.name} now: {model.dialect.name} has no words for this layout")
    if contradicts(model, changes):
        yield f"{hf_quant_config.NAME} is left out: it would contradict the new config"
    if _copy_is_stale(model, changes):
        yield f"{CONFIG_COPY_NAME} is left out: it would contradict the new config"


def _changed(file: JsonFile, text: str, checkpoint: Checkpoint) -> Iterator[TextFile]:
    if text != file.text:
        yield TextFile(file.name, text, checkpoint.files[file.name])


def _index_text(checkpoint: Checkpoint, index: JsonFile, edits: Edits) -> str:
    """The index with its ``total_size`` brought up to date, where it has one, and tensors dropped and renamed."""
    text = index.text
    metadata = index.value.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        grown = sum((new.nbytes if new else 0) - checkpoint.tensors[old].nbytes for old, new in edits.items())
        stored = sum(shard.header.data_bytes for shard in checkpoint.shards.values())
        text = replace_value(text, ("metadata", "total_size"), stored + grown)
    names = {old: new and (new.name or old) for old, new in edits.items()}
    if any(new != old for old, new in names.items()):
        weight_map = index.value["weight_map"].items()
        kept = {new: shard for old, shard in weight_map if (new := names.get(old, old)) is not None}
        text = replace_value(text, ("weight_map",), kept)
    return text


def _refuse_directory_of_our_name(checkpoint: Checkpoint) -> None:
    inside = next((name for name in checkpoint.files if name.startswith(MANIFEST_NAME + "/")), None)
    if inside is not None:
        raise CheckpointError(
            "A directory has the name of the manifest",
            where=f"{checkpoint.storage}/{MANIFEST_NAME}",
            expected="nothing, or the manifest of an earlier conversion",
            found=f"a directory with {inside.partition('/')[2]}",
            hint="rename it",
        )
