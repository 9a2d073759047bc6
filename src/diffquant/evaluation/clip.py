"""ClipScore: the agreement of pictures with their prompts, by a CLIP model in a local directory; nothing is downloaded.

The score of a picture is 100 max(cos(image embedding, text embedding), 0). Source: Hessel et al. 2021 (arXiv 2104.08718).
*Differs*: their weight is 2.5; published tables of quantized models use 100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffquant.errors import EvaluationError

BATCH = 32  # pictures per call


@final
class ClipScore:
    """A CLIP model that scores pictures by their prompts. Pictures are resized with PIL, prompts cut to the model's length."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str, sha256: str) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.name, self.sha256 = name, sha256

    @classmethod
    def from_directory(cls, folder: str | Path) -> ClipScore:
        """A directory that transformers wrote: model (safetensors), tokenizer and image processor.

        Raises `EvaluationError` where it is missing or holds something else.
        """
        folder = Path(folder)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise EvaluationError(
                f"{folder}: holds no model.safetensors; give the directory of a CLIP model, as transformers writes it"
            )
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise EvaluationError(f"{folder}: not a CLIP model with its tokenizer and image processor: {reason}") from error
        return cls(model, tokenizer, processor, folder.resolve().name, hashlib.sha256(weights.read_bytes()).hexdigest())

    @torch.no_grad()
    def score(self, pictures: UInt8[Tensor, "n c h w"], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The score of each picture, 0 to 100; grey pictures are repeated over three channels."""
        if len(pictures) != len(prompts):
            raise EvaluationError(f"clip: {len(pictures)} pictures for {len(prompts)} prompts; give one each")
        parts = [slice(start, start + BATCH) for start in range(0, len(pictures), BATCH)]
        return torch.cat([self._score(pictures[part], list(prompts[part])) for part in parts])

    def _score(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        images = [Image.fromarray(picture.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()) for picture in pictures]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = self.model(pixel_values=pixels, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        cosine = functional.cosine_similarity(output.image_embeds, output.text_embeds)  # [n]
        return 100 * cosine.clamp(min=0)
