"""A model of the hub brought into the cache of huggingface_hub, by that library: it resumes, and uses Xet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from rewrite.errors import StorageError
from rewrite.integrations.hub import HubStorage, Snapshot
from rewrite.integrations.hub_errors import hub_errors
from rewrite.progress import Counter, Progress


def download(storage: HubStorage, workers: int, progress: Progress | None) -> Snapshot:
    """The directory of the model in the cache, complete. Files that lie there are not asked for again."""
    files = storage.list_files().files
    counter = Counter(sum(file.size for file in files.values()), progress)

    class Bar(tqdm):  # type: ignore[type-arg] # generic in its stubs only
        """Shows nothing, and counts."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            counter.advance(int(n or 0))

    def fetch(name: str) -> Path:
        if (cached := storage.in_cache(name)) is not None:
            counter.advance(files[name].size)
            return cached
        with hub_errors(f"{storage}/{name}"):
            path = Path(hf_hub_download(storage.model, name, revision=storage.commit, tqdm_class=Bar))
        if path.stat().st_size != files[name].size:
            raise StorageError("The download is not complete", where=f"{storage}/{name}", hint="run it again")
        return path

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        paths = dict(zip(files, pool.map(fetch, files), strict=True))
    name, path = next(iter(paths.items()))
    root = path.parents[name.count("/")]
    found = Snapshot(str(root), storage.model)
    extra = found.list_files().files.keys() - files.keys()
    if root.name != storage.commit or extra:
        where = str(root)
        raise StorageError("The cache holds another model", where=where, expected=storage.commit, found=sorted(extra))
    return found
