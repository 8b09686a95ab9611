"""Converted files: what they keep of the original."""

import pytest
import torch
from lora_files import kohya, make
from safetensors.torch import load_file, save_file

from unziplora.formats.convert import convert


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_number_format_is_that_of_the_factors_whatever_an_embedding_has(tmp_path, dtype):
    embedding = {"bundle_emb.flora.clip_l": torch.ones(1, 8, dtype=torch.float64)}
    factors = {name: tensor.to(dtype) for name, tensor in kohya(make()).items()}
    save_file({**factors, **embedding}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"read without 'bundle_emb\.flora\.clip_l'"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout="diffusers")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {dtype}
