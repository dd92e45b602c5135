"""DLGSANet in folders and repositories as the Hugging Face Hub has them.

A folder has `config.json` (arguments of DLGSANet), `model.safetensors` (weights, with the same
configuration in their metadata) and a model card, `README.md`. huggingface_hub's
PyTorchModelHubMixin reads and writes the first two as well.
"""

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dlgsanet_arch.errors import UserError
from dlgsanet_arch.files import disk_faults_named

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_CARD = """---
library_name: dlgsanet-arch
pipeline_tag: image-to-image
tags: [super-resolution, dlgsanet, model_hub_mixin, pytorch_model_hub_mixin]
---
# {name}

{facts}

```python
from dlgsanet_arch import DLGSANet

network = DLGSANet.from_pretrained("{source}")
enlarged = network(images)  # (B, {channels}, H, W) in [0, 1], to {scale} times the size
```

DLGSANet: Li, Pan, Tang and Dong, ICCV 2023.
"""


def _hub() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise UserError(
            "the Hugging Face Hub needs huggingface_hub; run: pip install 'dlgsanet-arch[hub]'"
        ) from error


def _download(repo_id: str, options: Mapping[str, Any]) -> Path:
    hub = _hub()
    try:
        files = [CONFIG, WEIGHTS]
        return Path(hub.snapshot_download(repo_id, allow_patterns=files, **options))
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{repo_id} is not a folder, a file, or the name of bundled weights, and cannot be "
            f"downloaded from the Hugging Face Hub: {reason}"
        ) from error


class HubMixin:
    """Methods of DLGSANet that load, save and share weights with their configuration."""

    config: dict[str, Any]

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Self":
        """Build a network with trained weights, on the CPU in eval mode.

        Args:
            source: A folder with `model.safetensors` and perhaps `config.json`, a file of weights
                in any format, the name of bundled weights ("tiny_x4"), or a repository on the
                Hugging Face Hub ("owner/name"), which needs huggingface_hub.
            options: Of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

        Raises:
            UserError: The weights cannot be found or read, or do not fit the configuration.
        """
        from dlgsanet_arch.checkpoint import bundled_weights, read_checkpoint  # import the network

        path, config = Path(source), {}
        if path.is_dir() or not (path.exists() or str(source) in bundled_weights()):
            folder = path if path.is_dir() else _download(str(source), options)
            path = folder / WEIGHTS
            if (folder / CONFIG).is_file():
                try:
                    config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
                except (OSError, TypeError, ValueError, RecursionError) as error:
                    raise UserError(f"{folder / CONFIG} cannot be read: {error}") from error
        found = read_checkpoint(path, config=config)
        network = cls(**found.config)
        network.load_state_dict(found.weights, strict=True)
        return network.eval()

    def save_pretrained(
        self, folder: str | Path, notes: Mapping[str, str] | None = None, name: str | None = None
    ) -> None:
        """Write `config.json`, `model.safetensors` and a model card; UserError where it fails.

        `notes` are facts for the card and the file's metadata, such as `trained_on` and `licence`;
        `name` is what users load according to the card, by default the folder's name.
        """
        from dlgsanet_arch.checkpoint import Checkpoint, save_checkpoint

        folder = Path(folder)
        weights = {key: each.detach().cpu() for key, each in self.state_dict().items()}
        content = Checkpoint(weights, self.config, notes=dict(notes or {}))
        facts = {"scale": f"x{content.scale}", "parameters": f"{content.parameters:,}"}
        facts = {key.replace("_", " "): value for key, value in (facts | content.notes).items()}
        card = _CARD.format(
            name=content.name,
            facts="\n".join(f"- {key.capitalize()}: {value}" for key, value in facts.items()),
            source=name or folder.name,
            channels=self.config["in_chans"],
            scale=content.scale,
        )
        with disk_faults_named(f"{folder} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.config, indent=2) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")
            (folder / CARD).write_text(card, encoding="utf-8")
        save_checkpoint(content, folder / WEIGHTS)

    def push_to_hub(
        self, repo_id: str, notes: Mapping[str, str] | None = None, **options: Any
    ) -> str:
        """Create a repository on the Hugging Face Hub if need be, and upload the network to it.

        `repo_id` is "owner/name", `notes` are those of `save_pretrained`, and options `private`
        and `token`. Returns the address of the commit.
        """
        api = _hub().HfApi(token=options.get("token"))
        repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, notes, name=repo_id)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
