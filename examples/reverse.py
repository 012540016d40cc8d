"""Your own task: spell a word backwards. Its rows, tokenizer, model shape and reward.

python examples/reverse.py      writes data/reverse: rows, tokenizer, config.json
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

FOLDER = Path("data/reverse")
WORDS = ["<eos>", "<pad>", "reverse", "->", *"abcdefgh"]
ROWS = {"train": 2000, "val": 200, "rl": 2000}  # rows per file
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def reward(response: str, row: dict) -> float:
    """1 for the word backwards. row: the data row, all of its columns."""
    return float(response == row["answer"])


def main() -> None:
    rng = random.Random(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, n_rows in ROWS.items():
        lines = []
        for _ in range(n_rows):
            word = rng.choices("abcdefgh", k=rng.randint(3, 8))
            back = " ".join(reversed(word))
            row = {"prompt": f"reverse {' '.join(word)} ->", "answer": back, "response": back}
            lines.append(json.dumps(row) + "\n")
        (FOLDER / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(special))
    (FOLDER / "config.json").write_text(json.dumps(MODEL))


if __name__ == "__main__":
    main()
