"""Agreement: compare what the ranks say about themselves and write the one verdict that all of them get."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distckpt_backends.errors import DistckptError

from distckpt.errors import MixedRankDevices, ModelsDiffer, PlansDiffer, RanksDisagree, StageMissing
from distckpt.ranks.regionplan import canonical, describe, differences
from distckpt.ranks.signature import different
from distckpt.ranks.statement import listed
from distckpt.ranks.store import Verdict, spans

SHOWN = (
    4  # different answers to one question that a diff shows; their first ranks are asked for the long text
)

# Equal on every rank, in the order in which a difference is reported. The device type has a rule of its own.
_EQUAL = ("world size", "distckpt", "torch", "rule", "device backend", "collectives")

Groups = dict[str, list[int]]  # answer -> the ranks that gave it


def judge(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    """Compare the ranks' statements. While ``texts`` is None it may ask for some, when only hashes differ.

    The first difference decides which error it is; every difference is in its diff by rank.
    """
    said = {rank: json.loads(message) for rank, message in messages.items()}
    failures = {rank: s["failure"] for rank, s in said.items() if "failure" in s}
    if failures:
        return _failed(failures, len(said))
    devices = _grouped({rank: s["device type"] for rank, s in said.items()})
    rule = next(iter(said.values()))["rule"]
    found: list[tuple[type[DistckptError], str, list[str]]] = []
    for question in _EQUAL:
        if question == "device backend" and len(devices) > 1:
            continue  # follows from the device type
        groups = _grouped({rank: s[question] for rank, s in said.items()})
        if len(groups) > 1:
            found.append((RanksDisagree, question, _by_rank(question, groups)))
    mixed = _mixed(devices, rule)
    if mixed and rule == "error":
        found.append((MixedRankDevices, "device type", _by_rank("device type", devices)))
    missing = _missing_stage(said)
    if missing:
        return Verdict.of(missing)
    asked, compare = _hashes(said)
    if asked and texts is None:
        return Verdict(ask=tuple(asked))
    found.extend(compare({rank: json.loads(text) for rank, text in (texts or {}).items()}))
    if found:
        return Verdict.of(_error(found, len(said), all(s["place"] for s in said.values())))
    warned = f"ranks train on several device types: {'; '.join(_by_rank('device type', devices))}"
    return Verdict(warnings=(warned,) if mixed and rule == "warn" else ())


def judge_work(messages: dict[int, bytes], texts: dict[int, bytes] | None) -> Verdict:
    """Compare what came of the same work on every rank. A fact is equal over the ranks that have it."""
    said = {rank: json.loads(message) for rank, message in messages.items()}
    failures = {rank: s["failure"] for rank, s in said.items() if "failure" in s}
    if failures:
        return _failed(failures, len(said))
    names = dict.fromkeys(name for s in said.values() for name in s["facts"])
    answers = {n: _grouped({r: s["facts"][n] for r, s in said.items() if n in s["facts"]}) for n in names}
    differ = {name: groups for name, groups in answers.items() if len(groups) > 1}
    if not differ:
        return Verdict()
    lines = [line for name, groups in differ.items() for line in _by_rank(name, groups)]
    return Verdict.of(_error([(PlansDiffer, ", ".join(differ), lines)], len(said), meshed=True))


def _grouped(answers: Mapping[int, Any]) -> Groups:
    groups: Groups = defaultdict(list)
    for rank, answer in answers.items():
        groups[answer if isinstance(answer, str) else canonical(answer)].append(rank)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[1])))


def _mixed(devices: Groups, rule: str) -> bool:
    return rule != "all" and (len(devices) > 1 or "+" in next(iter(devices)))


def _by_rank(question: str, groups: Groups) -> list[str]:
    return [f"{question}: {answer} on {ranks(members)}" for answer, members in groups.items()]


def ranks(members: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    members = list(members)
    return f"rank{'s' * (len(members) > 1)} {spans(members)}"


def _failed(failures: dict[int, dict[str, Any]], size: int) -> Verdict:
    """What is wrong on a rank by itself, on every rank."""
    groups = _grouped(failures)
    first, members = next(iter(groups.items()))
    error = json.loads(first)
    error["where"] = "\n         ".join(filter(None, [f"{ranks(members)} of {size}", error["where"]]))
    others = [f"{json.loads(e)['what']}, on {ranks(m)}" for e, m in list(groups.items())[1:SHOWN]]
    error["why"] = "\n         ".join(filter(None, [error["why"], *others])) or None
    return Verdict(error)


def _missing_stage(said: Mapping[int, Any]) -> StageMissing | None:
    stages = {stage for s in said.values() for stage in s["plan"]}
    if not all(stage.isdigit() for stage in stages):
        return None
    absent = sorted(set(range(max(map(int, stages), default=-1) + 1)) - set(map(int, stages)))
    if not absent:
        return None
    by_rank = _by_rank("stages", _grouped({rank: sorted(s["plan"]) for rank, s in said.items()}))
    return StageMissing(
        f"no rank has stage {spans(absent)}",
        where=listed(by_rank),
        why="the regions of a stage that nobody checks may differ between its ranks",
        fix="pass every stage of this rank, check({0: first, 4: second}), or the mesh with its pipeline dimension",
    )


def _hashes(
    said: Mapping[int, Any],
) -> tuple[list[int], Callable[[Mapping[int, Any]], list[tuple[type[DistckptError], str, list[str]]]]]:
    """Which ranks' long texts are needed to show where hashes differ, and what shows it once they are there."""
    questions: list[tuple[type[DistckptError], str, str, Groups]] = []
    for kind, name in ((RanksDisagree, "streams"), (PlansDiffer, "given")):
        questions.append((kind, name, "", _grouped({r: s[name] for r, s in said.items()})))
    stages: dict[str, dict[int, str]] = defaultdict(dict)
    for rank, s in said.items():
        for stage, value in s["plan"].items():
            stages[stage][rank] = value
    questions.extend((PlansDiffer, "plan", stage, _grouped(stages[stage])) for stage in sorted(stages))
    questions.extend(_models(said))
    open_questions = [q for q in questions if len(q[3]) > 1]
    asked = sorted({members[0] for *_, groups in open_questions for members in list(groups.values())[:SHOWN]})

    def compare(texts: Mapping[int, Any]) -> list[tuple[type[DistckptError], str, list[str]]]:
        found: list[tuple[type[DistckptError], str, list[str]]] = []
        for kind, name, stage, groups in open_questions:
            told = [(members, texts[members[0]][name]) for members in groups.values() if members[0] in texts]
            untold = sorted(
                rank for members in groups.values() if members[0] not in texts for rank in members
            )
            if name == "streams":
                subject, lines = "random streams", _streams(told)
            elif name == "plan":
                subject, lines = f"regions of stage {stage}", _regions(told, stage)
            elif name == "given":
                subject, lines = "plan that was passed", _given(told)
            else:
                subject, lines = f"model of stage {stage}", _signatures(told, stage)
            rest = [f"{subject}: other ones on {ranks(untold)}, which did not tell them"] if untold else []
            found.append((kind, subject, lines + rest))
        return found

    return asked, compare


def _models(said: Mapping[int, Any]) -> list[tuple[type[DistckptError], str, str, Groups]]:
    """Per stage: structures over its ranks, and local shapes over those at one place of the mesh, where they differ."""
    answers: dict[tuple[str, int, str], dict[int, str]] = defaultdict(dict)
    for rank, s in said.items():
        place = s["place"] or ("", "")
        for stage, hashes in s["models"].items():
            for part, value in enumerate(hashes):
                answers[stage, part, place[part]][rank] = value
    return [
        (ModelsDiffer, "models", stage, _grouped(answers[stage, part, at]))
        for stage, part, at in sorted(answers)
    ]


def _streams(answers: list[tuple[list[int], Any]]) -> list[str]:
    return [f"random streams: {', '.join(names) or 'none'} on {ranks(members)}" for members, names in answers]


def _regions(answers: list[tuple[list[int], Any]], stage: str) -> list[str]:
    """Module by module, what each group of ranks does that differs from what most do."""
    parts = [(members, plan.get(stage, {})) for members, plan in answers]
    by_answer: dict[str, list[str]] = defaultdict(list)
    for name in sorted({name for _, regions in parts[1:] for name in differences(parts[0][1], regions)}):
        by_entry: dict[str, list[int]] = defaultdict(list)
        for members, regions in parts:
            by_entry[describe(regions.get(name))].extend(members)
        by_answer["; ".join(f"{entry} on {ranks(r)}" for entry, r in by_entry.items())].append(name)
    return [f"stage {stage}, {_names(names)}: {said}" for said, names in by_answer.items()]


def _signatures(answers: list[tuple[list[int], Any]], stage: str) -> list[str]:
    """Parameter by parameter in the model's order, what each group of ranks has."""
    parts = [
        (members, dict(map(tuple, [*structure, *shapes])))
        for members, models in answers
        for structure, shapes in [models[stage]]
    ]
    lines: dict[str, None] = {}
    for _, facts in parts[1:]:
        for fact in different(parts[0][1], facts):
            by_value: dict[str, list[int]] = defaultdict(list)
            for members, theirs in parts:
                by_value[_shown(theirs[fact]) if fact in theirs else "not there"].extend(members)
            said = "; ".join(f"{value} on {ranks(r)}" for value, r in by_value.items())
            lines[f"stage {stage}, {fact}: {said}"] = None
    return list(lines)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _names(names: list[str], most: int = 6) -> str:
    shown = [name or "the model" for name in names[:most]]
    return ", ".join([*shown, f"{len(names) - most} more"] if len(names) > most else shown)


def _given(answers: list[tuple[list[int], Any]]) -> list[str]:
    lines = []
    for members, stages in answers:
        counts = None if stages is None else {stage: len(regions) for stage, regions in stages.items()}
        shown = "none" if counts is None else f"regions by stage {canonical(counts)}"
        lines.append(f"plan that was passed: {shown} on {ranks(members)}")
    return lines


def _error(found: list[tuple[type[DistckptError], str, list[str]]], size: int, meshed: bool) -> DistckptError:
    kind, _, _ = found[0]
    lines = [line for _, _, part in found for line in part]
    whys = {
        RanksDisagree: "ranks that differ here run different programs, and their collectives need not match",
        MixedRankDevices: "a region stashes the random state of the CPU and one other device type, equal on all ranks",
        PlansDiffer: "a replay may contain collectives; ranks of one stage that replay differently wait for each other",
        ModelsDiffer: "ranks of one stage train one model; where they differ, collectives hang or mix what does not "
        "belong together",
    }
    fixes = {
        RanksDisagree: "give every rank the same environment, and register the same streams everywhere",
        MixedRankDevices: 'train on one device type, or choose Coordinator(rule="warn") or rule="all"',
        PlansDiffer: "apply the same regions on every rank of a stage; stages that may differ need stage= or mesh=",
        ModelsDiffer: "build, freeze and set the same model on every rank of a stage"
        + (
            ""
            if meshed
            else "; pass mesh= to say which ranks are other stages, or have other parts of plain tensors: without it "
            "all ranks of a stage are compared as one group"
        ),
    }
    subjects = ", ".join(dict.fromkeys(subject for _, subject, _ in found))
    return kind(f"{size} ranks differ in: {subjects}", where=listed(lines), why=whys[kind], fix=fixes[kind])
