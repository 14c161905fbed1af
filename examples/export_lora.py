"""Plan an edit and write it as a LoRA adapter that plain PEFT loads onto the unchanged model."""

import argparse
from pathlib import Path

from retouch import Fact, apply, from_peft, open_model, plan, to_peft


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a .gguf file, or smollm2")
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder of the adapter")
    args = parser.parse_args()

    model = open_model(args.model)
    change = plan(model, [Fact("The capital of {} is", "France", "Lyon")], "rome")
    to_peft(change, model, args.out)

    back = from_peft(args.out, model)
    print("read back, same weights:", apply(model, back).fingerprint == apply(model, change).fingerprint)
    print(f"elsewhere: peft.PeftModel.from_pretrained(network, {str(args.out)!r})")


if __name__ == "__main__":
    main()
