"""Write a file of facts into a model together, and measure what each one did."""

import argparse
from pathlib import Path

from retouch import edit_facts, open_model
from retouch.edit.evaluate import examine, grade
from retouch.edit.facts import disjoint, load


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a .gguf file, or smollm2")
    parser.add_argument("--facts", type=Path, default=Path(__file__).with_name("facts.jsonl"))
    parser.add_argument("--method", default="memit", help="see: retouch methods edit")
    args = parser.parse_args()

    model = open_model(args.model)
    facts = disjoint(load(args.facts))
    exams = examine(model, facts)  # what the unedited model says
    edited = edit_facts(model, facts, args.method)
    for exam in exams:
        numbers = grade(edited.model, exam)
        print(f"{exam.fact.filled} {exam.fact.target}")
        for name in ("efficacy", "paraphrase", "s_same", "r_same"):
            if name in numbers:
                print(f"    {name}: {numbers[name]:.2f}")


if __name__ == "__main__":
    main()
