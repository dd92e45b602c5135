"""DLGSANet in the folders and repositories of the Hugging Face Hub; nothing leaves this machine."""

import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import SMALL_ARGUMENTS

from dlgsanet_arch import DLGSANet
from dlgsanet_arch.checkpoint import bundled_weights, read_checkpoint
from dlgsanet_arch.errors import UserError

# Arguments that weights do not show, so that only the configuration can bring them back.
OPTIONS = SMALL_ARGUMENTS | {"activation": "gelu", "img_range": 2.0}
NOTES = {"trained_on": "nothing", "licence": "Apache-2.0"}


class Mixed(huggingface_hub.PyTorchModelHubMixin, DLGSANet):
    """The same network as users of the hub's own mixin would make it."""


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DLGSANet(**OPTIONS).eval()


def assert_same(found, expected):
    assert not found.training
    x = torch.rand(2, 3, 12, 9)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))


def test_a_saved_folder_brings_back_network_and_settings(net, tmp_path):
    net.save_pretrained(tmp_path / "mine", NOTES)
    found = DLGSANet.from_pretrained(tmp_path / "mine")
    assert_same(found, net)
    assert found.config == net.config
    checkpoint = read_checkpoint(tmp_path / "mine/model.safetensors")
    assert checkpoint.is_stated
    assert checkpoint.notes == NOTES
    card = (tmp_path / "mine/README.md").read_text()
    for text in ('from_pretrained("mine")', "Trained on: nothing", "Scale: x2", "(B, 3, H, W)"):
        assert text in card
    assert huggingface_hub.ModelCard(card).data.pipeline_tag == "image-to-image"
    (tmp_path / "mine/config.json").unlink()  # the weights' own metadata has it too
    assert_same(DLGSANet.from_pretrained(str(tmp_path / "mine")), net)


def test_the_hub_s_own_mixin_reads_and_writes_the_same_folders(net, tmp_path):
    net.save_pretrained(tmp_path / "ours")
    theirs = Mixed.from_pretrained(str(tmp_path / "ours"))
    assert isinstance(theirs, Mixed)
    assert_same(theirs, net)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(DLGSANet.from_pretrained(tmp_path / "theirs"), net)


@pytest.mark.parametrize("source", ["tiny_x4", bundled_weights()["tiny_x4"]])
def test_files_and_bundled_weights_are_found(source):
    found = DLGSANet.from_pretrained(source)
    assert_same(found, read_checkpoint("tiny_x4").network())


class FakeHub:
    """huggingface_hub's calls, with a folder as the hub."""

    def __init__(self, folder):
        self.folder, self.asked = folder, {}
        self.errors = huggingface_hub.errors

    def HfApi(self, token=None):
        self.asked["token"] = token
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.asked["private"] = private
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, allow_patterns, **options):
        self.asked |= options
        if not (self.folder / repo_id).is_dir():
            raise self.errors.HFValidationError("Repo id must be in the form 'namespace/name'")
        assert allow_patterns == ["config.json", "model.safetensors"]
        return str(self.folder / repo_id)


def test_what_is_pushed_can_be_pulled(net, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    address = net.push_to_hub("tiny", NOTES, private=True, token="secret")
    assert address == "https://hub/me/tiny/commit/1"
    assert hub.asked == {"token": "secret", "private": True}
    assert 'from_pretrained("me/tiny")' in (tmp_path / "me/tiny/README.md").read_text()
    assert_same(DLGSANet.from_pretrained("me/tiny", revision="main"), net)
    assert hub.asked["revision"] == "main"
    with pytest.raises(UserError, match=r"absent is not a folder.*namespace/name"):
        DLGSANet.from_pretrained("absent")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[1]", "config.json cannot be read"),
        ("[" * 100_000, "config.json cannot be read"),
        ('{"dims": 8}', "no argument 'dims'.*did you mean 'dim'"),
        ('{"dim": 24}', "model.safetensors"),
        ('{"activation": "tanh"}', "activation"),
    ],
)
def test_a_wrong_configuration_is_named(net, tmp_path, config, message):
    net.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        DLGSANet.from_pretrained(tmp_path)


def test_what_is_missing_is_named(net, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        DLGSANet.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        net.save_pretrained(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"dlgsanet-arch\[hub\]"):
        DLGSANet.from_pretrained("owner/name")
