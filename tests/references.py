"""Twenty prompts of mixed lengths and what transformers' own greedy generate answers to them, in fp32.

`python -m tests.references` computes tests/data/greedy_smollm2.json again (a minute on one core); a test checks a few
of them live, so the file cannot drift from the installed transformers unnoticed.
"""

import json
from pathlib import Path

MAX_NEW_TOKENS = 32
FILE = Path(__file__).parent / "data" / "greedy_smollm2.json"

QUESTIONS = [
    "What is the capital of France?",
    "2+2=",
    "Write a haiku about the sea.",
    "List five prime numbers.",
    "Who wrote Hamlet? Answer in one word.",
    "Explain photosynthesis in one paragraph, as if to a child.",
    "Translate 'good morning' into Spanish, French and German.",
    "Tell me a story about a robot and a cat. " * 3,
    "Summarise: " + "The quick brown fox jumps over the lazy dog. " * 12,
    "Count from one to ten. " * 10,
    "Name three rivers in Africa.",
    "Why is the sky blue? " * 25,
    "def fibonacci(n):",
    "日本の首都はどこですか？",
    "Give me an emoji for joy 😀 and one for rain ☔, and say why.",
    "What is the boiling point of water at sea level in Celsius?",
    "Correct the grammar: he go to school every days. " * 6,
    "Repeat after me: " + " ".join(f"word{i}" for i in range(60)),
    "Describe the water cycle. " * 40,
    "Hello!",
]


def prompts(model_dir: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c in chats]


def generate(model_dir: Path, token_ids: list[list[int]]) -> list[list[int]]:
    """New tokens of each prompt, EOS included where it ends there."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    outputs = []
    for ids in token_ids:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
        outputs.append(out[0, len(ids) :].tolist())
    return outputs


def load() -> list[dict]:
    """[{question, prompt, output}], token ids."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    from cluster.models import resolve

    directory = resolve("smollm2", print)
    ids = prompts(directory)
    rows = [
        {"question": q, "prompt": p, "output": o}
        for q, p, o in zip(QUESTIONS, ids, generate(directory, ids), strict=True)
    ]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
