"""Embed texts: the mean of a model's last hidden states, of norm 1."""

from pathlib import Path

import numpy as np

from montessori_core.errors import UserError

_UNUSED = ("pooler.", "position_ids")  # weights that the mean does not need, which files may lack


class Embedder:
    """An embedding model.

    The mean over the tokens of a text, padding excluded, is that of sentence-transformers' mean pooling. A text is cut at
    `max_length` tokens, or at the tokenizer's limit if that is lower.
    """

    BATCH = 32
    """Texts that are embedded together."""

    def __init__(self, folder: Path, max_length: int, setting: str) -> None:
        """Load a model; errors call it by `setting`.

        Raises:
            UserError: the model cannot be loaded, or lacks weights.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        from montessori_core.models.device import compute_device
        from montessori_core.models.load import describe_load_error

        self._device = compute_device()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
            model, info = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:  # of a damaged file, and of a package that is not installed
            raise UserError(
                f"{setting}: {folder} cannot be loaded ({describe_load_error(error)}); download the model again, or set "
                "another one"
            ) from error
        if missing := sorted(name for name in info["missing_keys"] if not any(part in name for part in _UNUSED)):
            raise UserError(
                f"{setting}: {folder} lacks {len(missing)} weights, e.g. {missing[0]}; use a complete model"
            )
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._tokenizer.padding_side = "right"
        self._model = model.to(self._device).eval()
        self._max_length = min(max_length, self._tokenizer.model_max_length)

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return the [texts, features] embeddings."""
        import torch

        # An empty text has no tokens; the mean would be zero over zero.
        batch = self._tokenizer(
            [text or " " for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            states = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
            return np.asarray(torch.nn.functional.normalize(means, dim=1).cpu().numpy(), np.float32)
