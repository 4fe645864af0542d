"""Where configuration files are found, and which one wins."""

from uft.config.compose import require
from uft.config.files import Request
from uft.config.messages import conf_name, config_dirs, groups, headline


def write(folder, text):
    (folder / "optim").mkdir(parents=True)
    (folder / "optim" / "adamw.yaml").write_text(text)
    (folder / "optim" / "mine.yaml").write_text("# mine\nname: sgd\n")


def lr(request):
    return require(request).settings["optim"]["lr"]


def test_the_users_folder_shadows_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = lr(Request())
    write(tmp_path / "conf-user", "name: adamw\nlr: 0.5\n")
    assert before != 0.5
    assert lr(Request()) == 0.5
    write(tmp_path / "elsewhere", "name: adamw\nlr: 0.25\n")
    monkeypatch.setenv("UFT_CONF", str(tmp_path / "elsewhere"))
    assert lr(Request()) == 0.25


def test_config_dir_adds_and_does_not_shadow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = lr(Request())
    write(tmp_path / "extra", "name: adamw\nlr: 0.5\n")
    assert lr(Request(config_dir=str(tmp_path / "extra"))) == before
    assert require(Request(("optim=mine",), config_dir="extra")).settings["optim"]["name"] == "sgd"


def test_help_sees_the_same_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf-user", "# my Adam\nname: adamw\n")
    optims = groups(config_dirs())["optim"]
    assert headline(optims["adamw"]) == "my Adam"
    assert list(optims) == ["adafactor", "adamw", "adamw8bit", "mine", "muon", "rmsprop", "sgd"]
    assert conf_name(optims["mine"]) == "conf-user/optim/mine.yaml"
    assert conf_name(optims["sgd"]) == "conf/optim/sgd.yaml"


def test_headline_is_the_first_sentence(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("# @package _global_\n# One thing that\n# goes on. And another.\nname: x\n")
    assert headline(file) == "One thing that goes on"
    file.write_text("# One thing\n#   uft train data=x\nname: x\n")
    assert headline(file) == "One thing"
    file.write_text("name: x # not this\n# nor this\n")
    assert headline(file) == ""
