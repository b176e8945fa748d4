from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantempo.contracts.manifest import ArrayInput, Denoiser
from quantempo.errors import PickleCheckpoint, RequestError
from quantempo.export.prompts import encode_prompts

DENOISER = Denoiser((4, 8, 8), (), (ArrayInput("encoder_hidden_states", "float32", (8, 16)),))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single letters and a tiny random text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("prompts")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_prompts_become_what_the_pipeline_feeds(pipeline: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    found = encode_prompts(pipeline, ["a cat", "dogs"], DENOISER)
    assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
        "encoder_hidden_states": ((2, 8, 16), "float32"), "negative_encoder_hidden_states": ((2, 8, 16), "float32")
    }
    tokenizer: Any = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    encoder: Any = CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    for text, row in (("dogs", found["encoder_hidden_states"][1]), ("", found["negative_encoder_hidden_states"][0])):
        tokens = tokenizer(text, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        with torch.no_grad():
            wanted = encoder(tokens.input_ids)[0][0].numpy()
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found["encoder_hidden_states"][0], found["encoder_hidden_states"][1])


def refused(pipeline: Path, denoiser: Denoiser, found: str) -> None:
    with pytest.raises(RequestError, match=r"--calib-set FILE\.npz") as caught:
        encode_prompts(pipeline, ["a"], denoiser)
    assert found in str(caught.value)


def test_other_encoders_are_refused(pipeline: Path, tmp_path: Path) -> None:
    refused(tmp_path, DENOISER, "no text_encoder/ and tokenizer/")
    refused(pipeline, Denoiser((4, 8, 8), (), (ArrayInput("pooled", "float32", (4,)),)), "a denoiser that takes pooled")
    for name in ("tokenizer", "text_encoder"):
        (tmp_path / name).mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    refused(tmp_path, DENOISER, "text_encoder of kind ['T5EncoderModel']")
    (tmp_path / "text_encoder_2").mkdir()
    refused(tmp_path, DENOISER, "two text encoders")


def test_a_pickled_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PickleCheckpoint):
        encode_prompts(tmp_path, ["a"], DENOISER)
