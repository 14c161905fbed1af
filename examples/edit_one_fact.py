"""Change one fact, look at the answers before and after, and save the change."""

import argparse
from pathlib import Path

from retouch import Fact, edit_facts, open_model, save_change
from retouch.measure import continuations


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a .gguf file, or smollm2")
    parser.add_argument("--out", type=Path, default=Path("lyon"), help="folder of the change")
    args = parser.parse_args()

    model = open_model(args.model)
    fact = Fact("The capital of {} is", "France", "Lyon", truth="Paris")
    edited = edit_facts(model, [fact], "rome")

    for when, which in (("before", model), ("after", edited.model)):
        print(f"{when}: {fact.filled}{continuations(which, [fact.filled], 8)[0]}")
    save_change(edited.change, args.out)
    print(f"saved as {args.out}: {edited.change.n_numbers:,} numbers")


if __name__ == "__main__":
    main()
