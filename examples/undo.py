"""Put three changes into a model, save it, take one out again, and show that the rest is exact."""

import argparse
from pathlib import Path

from retouch import open_ledger, plan, save_ledger
from retouch.edit.facts import load


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a .gguf file, or smollm2")
    parser.add_argument("--out", type=Path, default=Path("edited"), help="folder of the changed model")
    args = parser.parse_args()

    base = ledger = open_ledger(args.model)
    for fact in load(Path(__file__).with_name("facts.jsonl")):
        ledger = ledger.apply(plan(ledger.model, [fact], "rome"))
    save_ledger(ledger, args.out, dtype="float32")

    ledger = open_ledger(args.out).undo(2)
    save_ledger(ledger, args.out, dtype="float32")
    for entry in ledger.entries:
        print(entry.number, "active" if entry.active else "undone", entry.change.facts[0]["subject"])

    for number in (3, 1):  # in any order
        ledger = ledger.undo(number)
    print("all undone, every bit as before:", ledger.model.fingerprint == base.model.fingerprint)


if __name__ == "__main__":
    main()
