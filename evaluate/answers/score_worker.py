"""A process that scores: lines of [tokenizer, pairs] in, lines of scores out. It imports little, as it starts late."""

from __future__ import annotations

import json
import sys

from dpkd.evaluate.metrics.exact_match import score


def main() -> None:
    """Say that it is up, then answer line by line until there is no more."""
    print("ready", flush=True)
    for line in sys.stdin:
        tokenizer, pairs = json.loads(line)
        print(json.dumps([score(prediction, references, tokenizer) for prediction, references in pairs]), flush=True)


if __name__ == "__main__":
    main()
