"""lm-evaluation-harness through ``local-completions``: the score that teacher forcing gives directly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from cli.conftest import make_tokenizer
from serve.conftest import NAME, Served

from jax_mono.decoder import Decoder

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval[api]")

WORDS = ["the quick", " brown fox", " jumps", " over", " the lazy dog", " return a", " + b", " déjà vu", " 日本"]


def questions() -> list[dict]:
    """Questions with three answers each; the model is random, so which one is right does not matter."""
    found = []
    for index in range(12):
        choices = [WORDS[(index * 5 + step) % len(WORDS)] + WORDS[(index + step * 2) % len(WORDS)] for step in range(3)]
        found.append({"question": WORDS[index % len(WORDS)] + "?", "choices": choices, "answer": index % 3})
    return found


def test_the_score_is_the_decoders_own(served: Served, direct: Decoder, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions()))
    task = {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny_choices.yaml").write_text(yaml.safe_dump(task))
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": NAME,
            "base_url": f"{served.url}/v1/completions",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "max_length": 511,
            "num_concurrent": 4,
            "batch_size": 2,
        },
        tasks=["tiny_choices"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    right, seen = 0, {sample["doc_id"]: sample for sample in results["samples"]["tiny_choices"]}
    assert direct.tokenizer is not None
    for index, question in enumerate(questions()):
        context = direct.tokenizer.encode(question["question"])
        sums = []
        for choice in question["choices"]:
            both = direct.tokenizer.encode(question["question"] + choice)
            sums.append(float(direct.score(both, padded=True).logprobs[len(context) - 1 :].sum()))
        told = [float(response[0]) for response in seen[index]["filtered_resps"]]
        assert told == pytest.approx(sums, abs=1e-4)
        right += max(range(3), key=sums.__getitem__) == question["answer"]
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / 12)
