"""Rows in the shapes of published data sets, of our own making, and what must come out of each.

ROWS: name -> (row, prompt, response, gold, columns not used). prompt and response are the texts
without a chat template, response None where SFT has nothing to train; gold None where there is
none.
"""


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def verl(gold, **more):
    return {
        "data_source": "own",
        "prompt": turns("What is 1 + 2?"),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"split": "train", "index": 7},
        **more,
    }


ASKED = "What is 1 + 2?"
CHAT = ASKED + "\n"  # a conversation without a template
TRACE = "<think>\nOne and two.\n</think>\n\nIt is \\boxed{3}."
WORKED = "One and two make three: $1 + 2 = \\boxed{3}$."

ROWS = {
    "GSM8K": (
        {"question": ASKED, "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
        ASKED,
        "1 + 2 = <<1+2=3>>3\n#### 3",
        "3",
        "",
    ),
    "MATH": (
        {"problem": ASKED, "level": "Level 1", "type": "Algebra", "solution": WORKED},
        ASKED,
        WORKED,
        "3",
        "level, type",
    ),
    "MATH-500": (
        {"problem": ASKED, "solution": WORKED, "answer": "3", "subject": "Algebra", "level": 1}
        | {"unique_id": "test/algebra/1.json"},
        ASKED,
        WORKED,
        "3",
        "level, subject, unique_id",
    ),
    "NuminaMath-CoT": (
        {"source": "own", "problem": ASKED, "solution": WORKED, "messages": turns(ASKED, WORKED)},
        CHAT,
        WORKED,
        "3",
        "source",
    ),
    "NuminaMath-1.5": (
        {"problem": ASKED, "solution": WORKED, "answer": "3", "problem_type": "Algebra"}
        | {"question_type": "math-word-problem", "source": "own", "synthetic": False},
        ASKED,
        WORKED,
        "3",
        "problem_type, question_type, source, synthetic",
    ),
    "NuminaMath-1.5, a proof": (
        {"problem": ASKED, "solution": "As shown above.", "answer": "proof", "source": "own"},
        ASKED,
        "As shown above.",
        None,
        "source",
    ),
    "OpenR1-Math": (
        {"problem": ASKED, "solution": WORKED, "answer": "3", "uuid": "a", "generations": [TRACE]}
        | {"correctness_math_verify": [True], "messages": turns(ASKED, TRACE)},
        CHAT,
        TRACE,
        "3",
        "correctness_math_verify, generations",
    ),
    "OpenThoughts": (
        {
            "system": "Think first.",
            "conversations": [
                {"from": "user", "value": ASKED},
                {"from": "assistant", "value": TRACE},
            ],
        },
        f"Think first.\n{CHAT}",
        TRACE,
        None,
        "",
    ),
    "ShareGPT": (
        {
            "id": "a1",
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": ASKED},
                {"from": "gpt", "value": "3"},
            ],
        },
        f"Hello\nHello!\n{CHAT}",
        "3",
        None,
        "",
    ),
    "DeepMath": (
        {"question": ASKED, "final_answer": "3", "difficulty": 5.0, "topic": "Sums"}
        | {"r1_solution_1": TRACE, "r1_solution_2": "x", "r1_solution_3": "y"},
        ASKED,
        TRACE,
        "3",
        "difficulty, r1_solution_2, r1_solution_3, topic",
    ),
    "DAPO-Math-17k": (verl("3"), CHAT, None, "3", "ability, data_source, extra_info"),
    "DAPO-Math-17k-Processed": (
        {"prompt": ASKED, "solution": "3", "data_source": "own", "source_prompt": turns(ASKED)}
        | {"ability": "MATH", "reward_model": {"ground_truth": "3", "style": "rule"}},
        ASKED,
        None,
        "3",
        "ability, data_source, source_prompt",
    ),
    "Big-Math": (
        {"problem": ASKED, "answer": "3", "source": "own", "domain": ["Sums"]}
        | {"llama8b_solve_rate": 0.5},
        ASKED,
        "3",
        "3",
        "domain, llama8b_solve_rate, source",
    ),
    "LIMO": ({"question": ASKED, "solution": TRACE, "answer": "3"}, ASKED, TRACE, "3", ""),
    "s1K": (
        {"solution": "3", "question": ASKED, "cot_type": "math", "source_type": "own"}
        | {"metadata": "{}", "cot": None, "thinking_trajectories": ["One and two."]}
        | {"attempt": "It is \\boxed{3}."},
        ASKED,
        TRACE,
        "3",
        "cot_type, metadata, source_type",
    ),
    "s1K-1.1": (
        {"solution": "3", "question": ASKED, "gemini_thinking_trajectory": "g"}
        | {"gemini_attempt": "g", "deepseek_thinking_trajectory": "One and two."}
        | {"deepseek_attempt": "It is \\boxed{3}."},
        ASKED,
        TRACE,
        "3",
        "gemini_attempt, gemini_thinking_trajectory",
    ),
    "OlympiadBench": (
        {"id": 1606, "question": ASKED, "solution": [WORKED], "final_answer": ["$3$"]}
        | {"context": None, "modality": "Text-only", "is_multiple_answer": False, "unit": None},
        ASKED,
        WORKED,
        "$3$",
        "is_multiple_answer, modality",
    ),
    "Skywork-OR1": (verl('["3"]'), CHAT, None, "3", "ability, data_source, extra_info"),
    "verl GSM8K": (
        verl("3", extra_info={"index": 0, "question": ASKED, "answer": "1 + 2\n#### 3"}),
        CHAT,
        "1 + 2\n#### 3",
        "3",
        "ability, data_source",
    ),
    "Alpaca": (
        {"instruction": "Add the numbers.", "input": "1, 2", "output": "3", "text": "Below is"},
        "Add the numbers.\n1, 2",
        "3",
        None,
        "text",
    ),
    "Dolly": (
        {"instruction": "Add the numbers.", "context": "1, 2", "response": "3"}
        | {"category": "closed_qa"},
        "Add the numbers.\n1, 2",
        "3",
        None,
        "category",
    ),
    "OpenMathReasoning": (
        {"problem": ASKED, "generated_solution": TRACE, "expected_answer": "3"}
        | {"problem_source": "own", "pass_rate_72b_tir": "0.5"},
        ASKED,
        TRACE,
        "3",
        "pass_rate_72b_tir, problem_source",
    ),
    "TRL prompt-completion": (
        {"prompt": turns(ASKED), "completion": turns(ASKED, "3")[1:]},
        CHAT,
        "3",
        None,
        "",
    ),
    "R1 columns": (
        {"question": ASKED, "answer": "3", "thinking": "One and two.", "final": "3"},
        ASKED,
        "<think>\nOne and two.\n</think>\n\n\\boxed{3}",
        "3",
        "",
    ),
}

# Countdown as TinyZero publishes it: its reward reads nums and target
COUNTDOWN = verl({"target": 98, "numbers": [44, 19, 35]}, nums=[44, 19, 35], target=98)
