"""Writes the files beside this one with DistillKit's own code, from a checkout of its repository.

    python tests/support/distillkit/write.py CHECKOUT

They were written with commit a61c2e7 of github.com/arcee-ai/DistillKit (Apache-2.0). The tests read the files alone:
its dependencies do not go with ours, and its repository is not on a package index.
"""

import json
import sys
from pathlib import Path

import torch

VOCABULARY, TERMS = 600, [0, 1, 2, "sqrt"]
COMMON = {"d": VOCABULARY + 1, "polynomial_terms": None, "residual_bins": [], "delta_encoding": False}
CONFIGS = {
    "exact": COMMON | {"k": 8, "exact_k": 8},
    "recommended": COMMON | {"k": 16, "exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": TERMS},
    "residuals": COMMON | {
        "k": 20, "exact_k": 2, "polynomial_terms": [0, 1], "delta_encoding": True, "error_diffusion": True,
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 5, "num_elements": 10},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 3},
        ],
    },
    "normalised": COMMON | {
        "k": 12, "exact_k": 1, "polynomial_terms": [0, "exp"], "term_dtype": "bfloat16", "normalize_t": True,
    },
    "legacy": {
        "vocab_size": VOCABULARY, "k": 12, "exact_k": 4, "polynomial_degree": 3, "with_sqrt_term": True,
    },
}  # fmt: skip


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import numpy as np
    import yaml
    from distillkit.compression import DistributionQuantizationConfig, LegacyLogitCompressionConfig, LogprobCompressor
    from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema, legacy_compressed_logit_schema

    here = Path(__file__).parent
    for name, values in CONFIGS.items():
        out, generator = here / name, torch.Generator().manual_seed(7)
        legacy = name == "legacy"
        if legacy:
            compressor = LogprobCompressor(legacy_config=LegacyLogitCompressionConfig(**values))
            config = values
        else:
            parsed = DistributionQuantizationConfig(**values)
            compressor, config = LogprobCompressor(config=parsed), parsed.model_dump(mode="json")
        expected = {}
        schema = legacy_compressed_logit_schema() if legacy else compressed_logit_schema()
        with StreamingParquetWriter(str(out), schema=schema, file_max_rows=2, queue_maxsize=8) as writer:
            for row, length in enumerate((14, 9, 6)):
                ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
                ids[-1] = 0  # the EOS
                if row == 2:
                    ids[-2] = 0  # one of them is the padding that DistillKit adds
                logits = 3 * torch.randn(1, length - 1, VOCABULARY, generator=generator)
                if legacy:
                    values_TK, ids_TK = torch.topk(logits - logits.mean(-1, keepdim=True), values["k"], dim=-1)
                else:
                    values_TK, ids_TK = torch.topk(torch.log_softmax(logits, -1), values["k"], dim=-1)
                packed = compressor.compress_from_sparse(ids_TK, values_TK)
                writer.write({"input_ids": ids.tolist()} | {key: part[0].tolist() for key, part in packed.items()})
                found_ids, found = compressor.decompress_to_sparse(
                    {key: part.float() if part.is_floating_point() else part for key, part in packed.items()}
                )
                expected |= {f"ids_{row}": found_ids[0].numpy(), f"values_{row}": found[0].float().numpy()}
                expected |= {f"input_ids_{row}": ids.numpy(), f"true_{row}": values_TK[0].numpy()}
        (out / "compression_config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
        np.savez_compressed(out / "expected.npz", **expected)


if __name__ == "__main__":
    main(sys.argv[1])
