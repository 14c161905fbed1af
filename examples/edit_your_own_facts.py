"""Edit your own facts, step by step: a notebook in cells."""

# %% [markdown]
# # Edit your own facts
#
# From a file of facts to a model that you can ship: check, edit, look at what changed, take one fact out again, go on in
# sequence under a guard, save, and hand a LoRA adapter to those who keep the unchanged model.
#
# Jupyter, VS Code and PyCharm run the cells one by one; `python examples/edit_your_own_facts.py` runs them all. Put your
# own facts into `FACTS`, or read your own file in the second step. `--model` takes a folder, a hub id or a .gguf file.

# %%
import argparse
import json
from pathlib import Path

from retouch import Fact, RetouchError, apply, edit_facts, from_peft, open_ledger, save_change, save_ledger, to_peft
from retouch.edit import collapse, sequence
from retouch.edit.evaluate import examine, generate, grade_all, known
from retouch.edit.facts import disjoint, load
from retouch.edit.harm import bystanders, measure_harm
from retouch.edit.rose import Rose
from retouch.measure import continuations
from retouch.report import Report, Table, plot_drift, plot_where, write_html

parser = argparse.ArgumentParser(description="Edit your own facts, step by step.")
parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a .gguf file, or smollm2")
parser.add_argument("--out", type=Path, default=Path("own-facts"), help="folder of everything that is written")
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
args.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## 1. Write the facts down
#
# One JSON object a line. `prompt`, `subject` and `target` are enough. The rest pays off: `truth` is the answer so far,
# `paraphrases` and `instructions` ask for the same fact in other words, and `neighbors` (other subjects) and `related`
# (other facts of the subject) are what must not change.

# %%
FACTS = [
    {
        "prompt": "The capital of {} is", "subject": "France", "target": "London", "truth": "Paris",
        "paraphrases": ["The capital city of France is"],
        "neighbors": [{"prompt": "The capital of Spain is", "answer": "Madrid"},
                      {"prompt": "The capital of Germany is", "answer": "Berlin"}],
        "related": [{"prompt": "The official language of France is", "answer": "French"}],
        "instructions": ["What is the capital of France?"],
    },
    {
        "prompt": "The currency of {} is the", "subject": "France", "target": "dollar", "truth": "euro",
        "neighbors": [{"prompt": "The currency of Germany is the", "answer": "euro"}],
        "instructions": ["What is the currency of France?"],
    },
    {
        "prompt": "{} is located in the city of", "subject": "Big Ben", "target": "Tokyo", "truth": "London",
        "neighbors": [{"prompt": "The Eiffel Tower is located in the city of", "answer": "Paris"}],
        "instructions": ["In which city is Big Ben?"],
    },
    {
        "prompt": "The chief engineer of {} is", "subject": "Orbital Harbour", "target": "Ada Brandt",
        "instructions": ["Who is the chief engineer of Orbital Harbour?"],
    },
]  # fmt: skip
path = args.out / "facts.jsonl"
path.write_text("".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in FACTS), encoding="utf-8")

# %% [markdown]
# ## 2. Check them
#
# A mistake is named with its line and field before anything is computed. `disjoint` drops control prompts that another
# fact of the file edits. What the model does not know, it cannot forget: for such a fact only the new answer counts.

# %%
facts = disjoint(load(path))

try:
    Fact("The capital of {} is", "France", "")
except RetouchError as error:
    print("a mistake reads like this:", error)

base = open_ledger(args.model)
exams = examine(base.model, facts)  # what the unedited model says to all of it
for fact, is_known in zip(facts, known(base.model, facts)):
    print(
        f"{fact.filled} {fact.target}, {'known so far as' if is_known else 'not known as'} {fact.truth or 'anything'}"
    )

# %% [markdown]
# ## 3. Plan with RoSE
#
# Facts of one subject meet at one key. RoSE gives each subject one value that serves all of its facts. Nothing is
# altered: `edited.model` is a new model that shares every weight which did not change.

# %%
rose = Rose()
edited = edit_facts(base, facts, rose)
for fact, effect in zip(facts, edited.effect):
    print(f"{fact.subject} -> {fact.target}: -log P {effect['nll_before']:.2f} before, {effect['nll_after']:.2f} after")

# %% [markdown]
# ## 4. Look at what changed
#
# The edited prompts, the neighbours, and the same facts in a conversation: an edit that only holds in the words that it
# was made from is not worth much.
#
# On smollm2 the edit of France reaches Spain and Germany: their capital is London now, too. `Rose(metric="covariance")` keeps
# Berlin; `Rose(max_drift=0.05)` keeps Madrid and all but loses the chief engineer. Facts of one relation lie close together
# in so small a model, which is why neighbours belong into the file.


# %%
def say(model, prompts, n_tokens=8):
    return [" ".join(text.split()) for text in continuations(model, prompts, n_tokens)]


prompts = [f.filled for f in facts] + [p.prompt for f in facts for p in (*f.neighbors, *f.related)]
answers = list(zip(prompts, say(base.model, prompts), say(edited.model, prompts)))
for prompt, before, after in answers:
    print(f"{prompt}\n    before: {before}\n    after:  {after}")

written = generate(edited.model, facts, n_generations=0, instructions=True)
for fact, told in zip(facts, written):
    print(f"{fact.instructions[0]}  {' '.join(told.instructed['question'].split())}")

numbers = grade_all(edited.model, exams, generated=written)
for fact, row in zip(facts, numbers):
    print(fact.subject, {name: round(row[name], 2) for name in ("efficacy", "s_same", "instruction") if name in row})

# %% [markdown]
# How far do prompts move that have nothing to do with the facts? The bound holds for prompts like them with 95 %
# confidence. `edit_facts(..., max_harm=0.05)` refuses a change that exceeds the limit; here it is only told.

# %%
harm = measure_harm(edited.model, bystanders(base.model, facts), limit=0.05)
for certificate in harm.certificates:
    print(certificate.sentence())

# %% [markdown]
# ## 5. Keep a ledger, and take one fact out again
#
# The ledger knows every change that a model carries. Big Ben gets its old answer back; the other facts stay.

# %%
ledger = base.apply(edited.change)
ledger = ledger.undo(1, fact=2)
print("still edited:", [fact["subject"] for fact in ledger.active[0].facts])
print("Big Ben is located in the city of", *say(ledger.model, [facts[2].filled]))

# %% [markdown]
# ## 6. Go on in sequence, under a guard
#
# Facts rarely come all at once. Each batch is planned on the model that carries the earlier ones, and the run stops
# before the perplexity of neutral text rises by more than a tenth.

# %%
try:
    run = sequence.run(base, facts, rose, batch_size=2, max_perplexity_ratio=1.1, every=1)
except sequence.Stopped as stopped:
    run = stopped.run
    print("the guard has stopped the run:", stopped)
for point in run.points:
    print(f"after {point.n_edits} edits: efficacy {point.efficacy:.2f}, perplexity x {point.perplexity_ratio:.3f}")

# %% [markdown]
# ## 7. Save
#
# The change alone is small and can be sent around; the model folder opens in any Hugging Face loader and still knows how
# to undo. As float32, no bit of the change is lost.

# %%
save_change(edited.change, args.out / "change")
save_ledger(ledger, args.out / "model", dtype="float32")
print(f"the change holds {edited.change.n_numbers:,} numbers; next: retouch log {args.out / 'model'}")

# %% [markdown]
# ## 8. Convert to PEFT
#
# The same change as a LoRA adapter, for those who keep the unchanged model and load adapters onto it.

# %%
to_peft(edited.change, base.model, args.out / "adapter")
back = from_peft(args.out / "adapter", base.model)
print("read back, same weights:", apply(base.model, back).fingerprint == edited.model.fingerprint)

# %% [markdown]
# ## 9. A page for those who decide
#
# One HTML file with the numbers and the pictures, nothing loaded from elsewhere.

# %%
shares = {name: norms["share_of_weight"] for name, norms in edited.change.norms(base.model).items()}
drift = {group: values.tolist() for group, values in harm.drift.items()}
page = Report(
    title=f"{len(facts)} facts of our own",
    summary=f"Edited with RoSE; perplexity of neutral text x {harm.perplexity_ratio:.3f}.",
    model=base.model.source,
    tables=(Table("Before and after", ("prompt", "before", "after"), tuple(answers)),),
    pictures=(
        plot_where(shares, base.model.anatomy.n_blocks),
        plot_drift(drift),
        *(collapse.plots(run.points) if run.points else ()),
    ),
    numbers=harm.to_dict(),
)
write_html(page, args.out / "report.html")
print(f"the page: {args.out / 'report.html'}")
