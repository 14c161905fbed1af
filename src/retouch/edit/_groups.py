"""Choose subjects and facts of the same-subject suite: objects, new objects, what the model knows, what must stay.

Nothing here reads a file. Recipe and counts: ``docs/suites.md``.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..measure import answers, continuations
from ..model import Model
from ..progress import report
from ..tokens import Text, encode
from ._fact import Fact, Prompt
from ._relations import Knowledge, Relation, Subject, fold, table
from .facts import is_stop

__all__ = ["MIN_RELATED", "Choice", "group_facts", "typed_prompts"]

MIN_RELATED = 4
"""Related prompts that every fact gets at least."""
_PARAPHRASES, _NEIGHBORS, _RELATED = 5, 5, 10
_CHUNK = 32  # subjects scored together
_TEMPLATES = 2  # clozes of a relation that are tried
_SPARE = 2  # times as many groups as wanted are looked for; those that the model knows best are kept
_COMMON = 3  # subjects that have an object which is drawn as a target, where there are such objects
_MIN_GIVEN = 2  # facts from the data that a group filled with the model's own answers needs


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Attributes:
        n: Facts of one subject.
        n_subjects: Groups.
        seed: Of everything random.
        subjects: Keys of the subjects that may be used.
    """

    n: int
    n_subjects: int
    seed: int
    subjects: tuple[str, ...]

    def random(self, *parts: object) -> random.Random:
        """Make a generator for one decision, which no other decision can shift."""
        return random.Random(" ".join(map(str, (self.seed, *parts))))


@dataclass(frozen=True)
class _Draft:
    """A fact that may be chosen.

    Attributes:
        given: Whether the truth is from the data; else it is the model's own answer.
        known: The model prefers the truth to the target.
        argmax: The truth is the model's first choice.
    """

    key: str
    relation: str
    template: str
    truth: str
    target: str
    given: bool = True
    known: bool = False
    argmax: bool = False


def group_facts(model: Model, data: Knowledge, choice: Choice) -> tuple[list[list[Fact]], dict[str, float]]:
    """Return groups of facts of one subject, and counts of how they came about.

    Subjects with enough relations come first, in seeded order. Where too few of their facts are known, subjects with
    fewer ones are filled: there the truth is what the model itself says.
    """
    search = _Search(model, data, choice)
    rich, poor = search.subjects()
    limit = max(8 * _CHUNK, 16 * choice.n_subjects)
    chosen: dict[str, list[_Draft]] = {}
    scored: dict[str, list[_Draft]] = {}
    for start in range(0, min(len(rich), limit), _CHUNK):
        found = search.known(rich[start : start + _CHUNK])
        scored |= found
        chosen |= {key: kept for key, drafts in found.items() if len(kept := search.apart(drafts)) == choice.n}
        report("Subjects with known facts", min(len(chosen), choice.n_subjects), choice.n_subjects)
        if len(chosen) >= _SPARE * choice.n_subjects:
            break
    best = sorted(chosen, key=lambda key: -sum(draft.argmax for draft in chosen[key]))
    chosen = {key: chosen[key] for key in best[: choice.n_subjects]}
    if choice.n > 1 and (missing := choice.n_subjects - len(chosen)):
        scored |= search.known(poor[: max(2 * _CHUNK, 2 * missing)])
        chosen |= search.filled({k: v for k, v in scored.items() if k not in chosen}, missing)
    groups = [search.facts(drafts) for drafts in chosen.values()]
    return groups, _counts(groups, list(chosen.values()), scored)


def typed_prompts(name: str, kind: str, taken: Iterable[str | None]) -> list[Prompt]:
    """Ask about a subject by its type, in an order of its own; relations near one that is taken are left out."""
    own = table()
    closed = frozenset().union(*(own.close(relation) for relation in taken))
    clozes = [cloze for relation, cloze in own.typed[kind].items() if relation not in closed]
    random.Random(fold(name)).shuffle(clozes)
    return [Prompt(cloze.replace("{}", name)) for cloze in clozes]


@dataclass(frozen=True)
class _Search:
    """One search with its model, data and choice."""

    model: Model
    data: Knowledge
    choice: Choice

    def subjects(self) -> tuple[list[str], list[str]]:
        """Order subjects: those that have relations enough, shuffled; then the others, those with most first."""
        keys = [key for key in self.choice.subjects if len(self.data.subjects[key].facts) > 1]
        self.choice.random("subjects").shuffle(keys)
        sizes = {key: len(_distinct(self.data.subjects[key].facts)) for key in keys}
        rich = [key for key in keys if sizes[key] >= self.choice.n]
        poor = sorted((key for key in keys if sizes[key] < self.choice.n), key=lambda key: -sizes[key])
        return rich, poor

    # Facts of the data

    def known(self, keys: Sequence[str]) -> dict[str, list[_Draft]]:
        """Draft the facts of subjects, and keep the known ones, each with its best cloze."""
        drafts = self.scored([draft for key in keys for draft in self._drafts(key)])
        best: dict[tuple[str, str], _Draft] = {}
        for draft in drafts:  # clozes stand in order of preference
            old = best.get((draft.key, draft.relation))
            if draft.known and (old is None or draft.argmax > old.argmax):
                best[draft.key, draft.relation] = draft
        found: dict[str, list[_Draft]] = {key: [] for key in keys}
        for draft in best.values():
            found[draft.key].append(draft)
        return found

    def _drafts(self, key: str) -> list[_Draft]:
        subject, drafts, targets = self.data.subjects[key], list[_Draft](), set[str]()
        for name, objects in sorted(subject.facts.items()):
            relation = self.data.relations[name]
            if (target := self.target(subject, relation, objects[0], targets)) is None:
                continue
            targets.add(fold(target))
            drafts += [_Draft(key, name, t, objects[0], target) for t in relation.templates[:_TEMPLATES]]
        return drafts

    def scored(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Say of each draft whether the model knows it."""
        names = [self.data.subjects[draft.key].name for draft in drafts]
        pieces = [(draft.template.partition("{}"), name) for draft, name in zip(drafts, names)]
        texts = [
            Text(before, name, after, answer)
            for ((before, _, after), name), draft in zip(pieces, drafts)
            for answer in (draft.truth, draft.target)
        ]
        said = answers(self.model, texts)
        return [
            replace(draft, known=old.nll < new.nll, argmax=old.strict)
            for draft, old, new in zip(drafts, said[::2], said[1::2])
        ]

    def apart(self, drafts: Sequence[_Draft], chosen: Sequence[_Draft] = ()) -> list[_Draft]:
        """Add drafts up to `n`, none near another: the model's first choices, then clozes that begin with the subject."""
        draw = self.choice.random("facts", *(d.key for d in drafts[:1]))
        shuffled = draw.sample(drafts, len(drafts))
        kept = list(chosen)
        closed = {near for draft in kept for near in table().close(draft.relation)}
        for draft in sorted(shuffled, key=lambda d: (not d.argmax, not d.template.startswith("{}"))):
            if len(kept) < self.choice.n and draft.relation not in closed:
                kept.append(draft)
                closed |= table().close(draft.relation)
        return kept

    # New objects

    def target(self, subject: Subject, relation: Relation, truth: str, taken: Iterable[str]) -> str | None:
        """Draw another object of a relation, with another first token than the truth; of its length if there is one.

        Objects that several subjects have come first. No object that the subject has in any relation, and none that is `taken`, is drawn.
        """
        barred = {fold(answer) for answers in subject.facts.values() for answer in answers} | {fold(truth), *taken}
        tokens = self._tokens[relation.id]
        own = self._ids([truth])[0]
        free = [
            o
            for o in relation.objects
            if fold(o) not in barred and tokens[o][0] != own[0] and not _overlap(fold(o), fold(truth))
        ]
        free = [o for o in free if len(relation.holders[fold(o)]) >= _COMMON] or free
        self.choice.random("target", subject.name, relation.id).shuffle(free)
        return min(free, key=lambda o: abs(len(tokens[o]) - len(own)), default=None)

    @cached_property
    def _tokens(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            name: dict(zip(relation.objects, self._ids(relation.objects)))
            for name, relation in self.data.relations.items()
        }

    def _ids(self, targets: Sequence[str]) -> list[tuple[int, ...]]:
        return [row.target for row in encode(self.model.tokenizer, [Text("It is", target=t) for t in targets])]

    # Facts that the model is asked for

    def filled(self, scored: Mapping[str, list[_Draft]], missing: int) -> dict[str, list[_Draft]]:
        """Fill groups with relations of the subject's type; their truth is the model's own answer."""
        given = {key: self.apart(drafts) for key, drafts in scored.items()}
        keys = [key for key in sorted(given, key=lambda key: -len(given[key])) if len(given[key]) >= _MIN_GIVEN]
        full: dict[str, list[_Draft]] = {}
        for start in range(0, len(keys), _CHUNK):
            part = keys[start : start + _CHUNK]
            own = self._own_answers({key: given[key] for key in part})
            for key in part:
                if len(group := self.apart(own[key], given[key])) == self.choice.n:
                    full[key] = group
            report("Subjects filled", min(len(full), missing), missing)
            if len(full) >= missing:
                break
        return dict(list(full.items())[:missing])

    def _own_answers(self, groups: Mapping[str, list[_Draft]]) -> dict[str, list[_Draft]]:
        asked = [(key, name, cloze) for key, drafts in groups.items() for name, cloze in self._typed(key, drafts)]
        prompts = [cloze.replace("{}", self.data.subjects[key].name) for key, _, cloze in asked]
        said: list[str] = []
        for start in range(0, len(prompts), 2 * _CHUNK):
            said += continuations(self.model, prompts[start : start + 2 * _CHUNK], 8)
        targets = {key: {fold(draft.target) for draft in drafts} for key, drafts in groups.items()}
        drafts = []
        for (key, name, cloze), text in zip(asked, said):
            subject, truth = self.data.subjects[key], _named(text)
            if not truth or _overlap(fold(truth), fold(subject.name)):
                continue
            if target := self.target(subject, self.data.relations[name], truth, targets[key]):
                targets[key].add(fold(target))
                drafts.append(_Draft(key, name, cloze, truth, target, given=False))
        found: dict[str, list[_Draft]] = {key: [] for key in groups}
        for draft in self.scored(drafts):
            if draft.known:
                found[draft.key].append(draft)
        return found

    def _typed(self, key: str, drafts: Sequence[_Draft]) -> list[tuple[str, str]]:
        """Return the clozes of a subject's type that ask for a relation which the data lacks."""
        own, facts = table(), self.data.subjects[key].facts
        closed = frozenset().union(*(own.close(name) for name in (*facts, *(d.relation for d in drafts))))
        clozes = own.typed[own.type_of(facts)]
        return [(name, t) for name, t in clozes.items() if name in self.data.relations and name not in closed]

    # From drafts to facts

    def facts(self, drafts: Sequence[_Draft]) -> list[Fact]:
        """Make the facts of one subject."""
        subject = self.data.subjects[drafts[0].key]
        related = self._related(drafts[0].key, [draft.relation for draft in drafts])
        return [self._fact(subject, draft, related) for draft in drafts]

    def _fact(self, subject: Subject, draft: _Draft, related: Sequence[Prompt]) -> Fact:
        relation = self.data.relations[draft.relation]
        others = [t for t in relation.templates if t != draft.template]
        return Fact(
            draft.template,
            subject.name,
            draft.target,
            draft.truth,
            relation=relation.id,
            id=f"{relation.id}:{subject.name}",
            paraphrases=tuple(t.replace("{}", subject.name) for t in others[:_PARAPHRASES]),
            neighbors=tuple(self._neighbors(draft, relation)),
            related=tuple(related),
            instructions=tuple(q.replace("{}", subject.name) for q in relation.questions),
        )

    def _neighbors(self, draft: _Draft, relation: Relation) -> list[Prompt]:
        """Ask the same of other subjects: of those with the same object if there are three, else of any."""
        draw = self.choice.random("neighbors", draft.key, relation.id)
        barred = {draft.key, *relation.holders.get(fold(draft.target), ())}
        keys = [key for key in relation.holders.get(fold(draft.truth), ()) if key not in barred]
        if len(keys) < 3:
            keys = sorted({key for held in relation.holders.values() for key in held} - barred)
        chosen = draw.sample(keys, min(_NEIGHBORS, len(keys)))
        cloze = draft.template if draft.given else relation.templates[0]  # one of a type need not fit the others' types
        return [self._neighbor(self.data.subjects[key], cloze, draft.truth, relation) for key in chosen]

    def _neighbor(self, other: Subject, cloze: str, truth: str, relation: Relation) -> Prompt:
        answers = other.facts[relation.id]
        shared = next((a for a in answers if fold(a) == fold(truth)), answers[0])
        return Prompt(cloze.replace("{}", other.name), shared, tuple(a for a in answers if a != shared))

    def _related(self, key: str, chosen: Sequence[str]) -> list[Prompt]:
        """Ask for the subject's other relations; where there are few, by clozes of its type."""
        subject, own = self.data.subjects[key], table()
        closed = frozenset().union(*(own.close(name) for name in chosen))
        names = [name for name in sorted(subject.facts) if name not in closed]
        self.choice.random("related", key).shuffle(names)
        prompts = [subject.prompt(self.data.relations[name]) for name in names[:_RELATED]]
        more = typed_prompts(subject.name, own.type_of(subject.facts), (*subject.facts, *chosen))
        return prompts + more[: max(0, MIN_RELATED - len(prompts))]


def _distinct(relations: Iterable[str]) -> list[str]:
    """Keep relations of which none is near another."""
    kept: list[str] = []
    for name in sorted(relations):
        if not table().close(name) & set(kept):
            kept.append(name)
    return kept


def _overlap(one: str, other: str) -> bool:
    """Say whether one name stands in the other."""
    return one in other or other in one


def _named(said: str) -> str:
    """Cut a continuation down to the name that it begins with: at most two words, up to a stop word or a sign."""
    words = re.split(r"[^\w\s'’-]|\n", said.strip(), maxsplit=1)[0].split()
    kept: list[str] = []
    for word in words[:2]:
        if is_stop(word) or not any(map(str.isalpha, word)):
            break
        kept.append(word)
    return " ".join(kept)


def _counts(
    groups: Sequence[Sequence[Fact]], drafts: Sequence[Sequence[_Draft]], scored: Mapping[str, Sequence[_Draft]]
) -> dict[str, float]:
    flat = [draft for group in drafts for draft in group]
    facts = [fact for group in groups for fact in group]
    share = 1 / max(len(flat), 1)
    return {
        "groups": len(groups),
        "facts": len(facts),
        "subjects_scored": len(scored),
        "groups_all_from_data": sum(all(draft.given for draft in group) for group in drafts),
        "facts_own_answer": sum(not draft.given for draft in flat),
        "known_argmax": sum(draft.argmax for draft in flat) * share,
        "subject_first": sum(draft.template.startswith("{}") for draft in flat) * share,
        "neighbors_same_object": sum(_same_object(fact) for fact in facts) * share,
        "related_with_answer": sum(p.answer is not None for f in facts for p in f.related)
        / max(sum(len(f.related) for f in facts), 1),
        **{f"relation_{name}": count for name, count in sorted(Counter(d.relation for d in flat).items())},
    }


def _same_object(fact: Fact) -> bool:
    return len(fact.neighbors) > 2 and all(fold(p.answer or "") == fold(fact.truth or "") for p in fact.neighbors)
