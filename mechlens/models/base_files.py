"""Find the files of a base, take their fingerprint, and explain why they do not load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from mechlens.core import foreign
from mechlens.core.command_lines import command_line
from mechlens.core.errors import SpecError
from mechlens.core.model_spec import ModelSpec, is_remote, model_of
from mechlens.core.spec import fingerprint
from mechlens.models.gguf import bases_folder, gguf_digest, is_gguf, unpack, unpacked_folder

VOCABULARIES = ("merges.txt", "vocab.txt")
"""files of a tokenizer that their suffix does not identify"""
WEIGHTS = Path(__file__).parents[1] / "menagerie" / "weights"
"""folder of the shipped bases"""
OUT_OF_REACH = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError",
    "ProxyError", "ReadTimeout",
}  # fmt: skip
"""exceptions of the hub's client and its HTTP libraries when no server answers"""


def locate(name: str) -> str:
    """Return where a base is: a folder on this machine, else a name on the hub.

    A GGUF file is unpacked if it was not before; the folder is then that of the unpacked model.

    Raises:
        SpecError: if it is a path or a menagerie name that does not exist.
        DataError: if it is a GGUF file that cannot be read.
    """
    spec = model_of(name)
    if spec.package is not None and (unpacked := unpacked_folder(spec.package.file_sha256)).is_dir():
        return str(unpacked)
    if spec.moved is not None:
        if (folder := moved_folder(spec)).is_dir():
            return str(folder)
        raise SpecError(f"base {name!r} is not on this machine; `{command_line('fetch', name)}` makes it")
    name = spec.source
    if is_gguf(name):
        return str(unpack(Path(name).expanduser()))
    shipped = sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir())
    if name in shipped:  # by name: joined to WEIGHTS, an absolute path would be taken for shipped
        return str(WEIGHTS / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpecError(
                f"base {name!r} is a folder without config.json; expected a Hugging Face checkpoint folder"
            )
        return str(folder)
    if name.startswith("menagerie") or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SpecError(
            f"base {name!r} is no folder here and no menagerie model; expected a checkpoint folder, a hub "
            f"name, or one of {', '.join(shipped)}"
        )
    return name


def moved_folder(spec: ModelSpec) -> Path:
    """Where the moved copy of a model is, now or later."""
    assert spec.moved is not None
    digits = fingerprint([describe_base(spec.source), spec.moved.recorded()])
    return bases_folder() / f"{spec.name}-{digits}"


def is_here(name: str) -> bool:
    """Whether a base's files are on this machine: in a folder, or in the cache of the hub."""
    if (spec := model_of(name)).moved:
        return moved_folder(spec).is_dir()
    source = locate(name)
    return Path(source).is_dir() or isinstance(
        try_to_load_from_cache(source, "config.json", revision=model_of(name).revision or None), str
    )


def hub_commit(name: str) -> str:
    """The commit of a hub base's revision in this machine's cache.

    It is the revision itself if nothing was fetched.
    """
    spec = model_of(name)
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=spec.source, repo_type="model")
    ref = repository / "refs" / (spec.revision or "main")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else spec.revision


def packed_sha256(name: str) -> str | None:
    """SHA-256 of the GGUF file that a base is unpacked from; None for other bases."""
    spec = model_of(name)
    if spec.package is not None and unpacked_folder(spec.package.file_sha256).is_dir():
        return spec.package.file_sha256
    return gguf_digest(Path(spec.source).expanduser()) if is_gguf(spec.source) else None


def describe_base(name: str) -> str:
    """Which checkpoint a base is now: its name with the hub's commit or the SHA-256 of its GGUF file."""
    if is_remote(name):
        return model_of(name).source
    if moved := model_of(name).moved:
        source = describe_base(model_of(name).source)
        return f"{source}, each weight matrix moved by {moved.share:g} of its norm (seed {moved.seed})"
    if packed := packed_sha256(name):
        package = model_of(name).package
        place = f"{package.name} {package.version}" if package else model_of(name).source
        return f"{place}, GGUF file of SHA-256 {packed}"
    source = locate(name)
    return source if Path(source).is_dir() else f"{source} at commit {hub_commit(name) or 'unknown'}"


def checkpoint_fingerprint(name: str) -> str:
    """Identity of a base: its files, number format, and pinned options of its chat template.

    A hub base has its name and commit in addition; an API model has only its id. A GGUF file is known by the
    SHA-256 of its bytes, whatever its name and wherever it is.

    float32 does not enter: so bases keep the fingerprints from before number formats counted.
    """
    if is_remote(name):
        return hashlib.sha256(model_of(name).source.encode()).hexdigest()[:16]
    packed, dtype = packed_sha256(name), model_of(name).dtype
    source = Path(model_of(name).source if packed else locate(name))
    origin = f"gguf:{packed}" if packed else "" if source.is_dir() else f"{source}@{hub_commit(name)}"
    digest = hashlib.sha256(origin.encode())
    digest.update(b"" if dtype == "float32" else dtype.encode())
    for file in () if packed else _files_of(source):
        digest.update(json.dumps([file.name, file.stat().st_size]).encode())
        with file.open("rb") as handle:
            while piece := handle.read(1 << 24):
                digest.update(piece)
    if options := model_of(name).template:
        digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _files_of(folder: Path) -> list[Path]:
    """The files of a checkpoint that decide its outputs; none for a hub name.

    These are configuration, weights, tokenizer and chat templates.
    """
    files = [
        file
        for file in sorted(folder.glob("*"))
        if file.suffix in (".json", ".safetensors", ".jinja", ".model") or file.name in VOCABULARIES
    ]
    return files + sorted(folder.glob("additional_chat_templates/*.jinja"))


class loading(foreign.named):  # noqa: N801 - it is used as a verb
    """Context that reads a base's files: an error becomes one line, which says if the hub is unreachable.

    Args:
        base: the name of the base.
        fault: what an error means, such as "has no tokenizer that loads".
    """

    def __init__(self, base: str, fault: str) -> None:
        self.base, self.source = base, locate(base)
        unpacked = Path(self.source).parent == bases_folder()
        advice = f"delete {self.source}, and it is unpacked or fetched again" if unpacked else ""
        super().__init__(f"base {base!r} {fault}", advice=advice)

    def message(self, error: Exception) -> str:
        fetched = Path(self.source).is_dir() or isinstance(
            try_to_load_from_cache(self.source, "config.json"), str
        )
        if fetched or not (constants.HF_HUB_OFFLINE or is_unreachable(error)):
            return super().message(error)
        hub = (
            "HF_HUB_OFFLINE keeps this process from the hub"
            if constants.HF_HUB_OFFLINE
            else "the hub cannot be reached"
        )
        remedy = "fetch it where the hub can be reached, or give the path of a checkpoint folder as the base"
        if model_of(self.base).package is not None:
            remedy = f"`{command_line('fetch', self.base)}` brings it"
        return f"base {self.base!r} is not on this machine, and {hub}; {remedy}"


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an exception, or a cause of it, means that the hub did not answer."""
    while error is not None:
        if OUT_OF_REACH & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False
